"""Exceptions to the rules, each with its reason.

A rule has to find exactly what is listed here, so that no exception stays behind when its cause is
gone.
"""

OTHER_STACK = "the layout of another stack's directories, of which megapipe runs nothing"
NUMBERS_ALONE = (
    "a schedule is made from the numbers of ranks and stages alone, without a config or a layout"
)

EXCEPTIONS: dict[str, dict[str, str]] = {
    "axis_sizes": {
        "megapipe/config/parallel.py: self.pipeline * self.virtual": (
            "the number of stages, which the checks of the config need before there is a layout"
        ),
        "megapipe/config/checks.py: math.prod(sizes.values())": (
            "the number of replicas, as far as a config names it: batch and streams are checked "
            "against it before there is a layout"
        ),
        "megapipe/conversion/megatron/writer.py: self.tensor * self.pipeline": OTHER_STACK,
        "megapipe/pipeline/schedule/limit.py: (1 / virtual,) * (pipeline * virtual)": (
            NUMBERS_ALONE
        ),
        "megapipe/pipeline/schedule/placement.py: pipeline * virtual": NUMBERS_ALONE,
        "megapipe/pipeline/schedule/stored.py: pipeline * virtual": NUMBERS_ALONE,
    },
    "unset_sizes": {
        "megapipe/config/axes.py: isinstance(size, int)": (
            "where sizes are read off a config, which leaves an unset one out: the layout fills it "
            "in, and checks before that count it as 1"
        ),
    },
    "config_fields": {},
    "parameter_names": {},
    "commands": {},
    "public_names": {},
}
"""Rule -> what it finds on the tree -> why that may stay."""
