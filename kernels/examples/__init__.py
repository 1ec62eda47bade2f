"""One call of each kernel at the sizes of a layer."""

from megapipe.kernels.examples import elementwise, optimizer, products
from megapipe.kernels.examples.example import Example

EXAMPLES: dict[str, Example] = {
    example.name: example
    for part in (elementwise, products, optimizer)
    for example in part.EXAMPLES
}
"""By the name of the kernel's file."""
