from tokenizers import Tokenizer, models

from megapipe.conversion.sentencepiece.charsmap import build_charsmap, precompiled


def test_each_character_becomes_its_text_and_no_other_changes() -> None:
    import json

    rules = {"a": "b", "\x01": "", "é": "e\u0301", "ﬁ": "fi", "㌔": "キロ", "\U0001d400": "A"}
    tree = json.loads(Tokenizer(models.BPE()).to_str())
    tree["normalizer"] = precompiled(build_charsmap(rules))
    normalizer = Tokenizer.from_str(json.dumps(tree)).normalizer
    changed = [
        character
        for character in map(chr, [*range(0xD800), *range(0xE000, 0x20000)])
        if normalizer.normalize_str(character) != character
    ]
    assert changed == sorted(rules)
    assert {character: normalizer.normalize_str(character) for character in rules} == rules
