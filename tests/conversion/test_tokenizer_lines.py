from megapipe.conversion.tokenizer_lines import HARD, REAL, proof_lines


def test_lines_are_the_same_each_time_and_hold_what_is_hard() -> None:
    lines = proof_lines(["a", "\u2581b", "<s>"], 600)
    assert lines == proof_lines(["a", "\u2581b", "<s>"], 600)
    assert len(lines) == 600
    assert {*HARD, *REAL} <= set(lines)
    for hard in ("", " a", "a ", "\t", "\n", "<s>", "</s>", "<unk>", "\u2581", "\0"):
        assert hard in HARD


def test_random_lines_are_text_that_can_be_stored() -> None:
    text = "".join(proof_lines(["a"], 1000))
    assert text.encode().decode() == text
    assert len(set(text)) > 2000
