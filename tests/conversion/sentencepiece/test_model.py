from typing import Any

import pytest

from megapipe.conversion.sentencepiece.model import CONTROL, NORMAL, read_model
from megapipe.errors import ConversionError
from tests.conversion.sentencepiece.samples import LLAMA2, trained


def changed(content: bytes, change: Any) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto.FromString(content)
    change(model)
    return bytes(model.SerializeToString())


def test_what_decides_about_ids_is_read() -> None:
    model = read_model(trained(**LLAMA2))
    assert (model.kind, model.byte_fallback, model.charsmap) == ("bpe", True, b"")
    assert (model.adds_space, model.squeezes, model.escapes_spaces) == (True, False, True)
    assert model.pieces[model.unknown].text == "<unk>"
    assert model.texts(CONTROL) == ["<s>", "</s>"]
    assert "\u2581" in model.texts(NORMAL)
    assert model.replaced(" a  \u2581") == " a  \u2581"


def refusals() -> dict[str, Any]:
    def piece_twice(model: Any) -> None:
        model.pieces[-1].piece = "<s>"

    return {
        "it is a word model": lambda model: setattr(model.trainer_spec, "model_type", 3),
        "it is a char model": lambda model: setattr(model.trainer_spec, "model_type", 4),
        "treat_whitespace_as_suffix": lambda model: setattr(
            model.trainer_spec, "treat_whitespace_as_suffix", True
        ),
        "its normaliser is 'user_defined', with rules of its own": lambda model: setattr(
            model.normalizer_spec, "name", "user_defined"
        ),
        "denormalizer_spec": lambda model: setattr(
            model.denormalizer_spec, "precompiled_charsmap", b"x"
        ),
        "two pieces with the text '<s>'": piece_twice,
        r"damaged \(precompiled_charsmap\)": lambda model: setattr(
            model.normalizer_spec,
            "precompiled_charsmap",
            model.normalizer_spec.precompiled_charsmap[:-3] + b"\xff\xff\0",
        ),
    }


@pytest.fixture(scope="module")
def content() -> bytes:
    return trained(model_type="bpe")


@pytest.mark.parametrize("reason", refusals())
def test_others_are_refused_by_name(content: bytes, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        read_model(changed(content, refusals()[reason]))
