"""Which file is loaded, which token ends documents, and what is said where that can't be."""

import json
import os
import re
from pathlib import Path

import pytest

from megapipe.data.tokenizer import check_vocabulary, load_tokenizer, not_used_beside
from megapipe.errors import DataError
from tests.data.tokenizer_samples import TEXT, byte_level, save, sentencepiece_model

# --- The file that is named ----------------------------------------------------------------------


def test_a_named_file_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "tokenizer.json", byte_level(("<eos>",)), tokenizer_config={"eos_token": "x"})
    named = save(tmp_path / "german-32k.json", byte_level(text="die neue fassung", size=265))
    tokenizer = load_tokenizer(named)
    assert tokenizer.path == named
    assert tokenizer.vocab_size == 265
    assert tokenizer.decode([tokenizer.end_of_document]) == "</s>", "not the other's eos_token"
    assert dict(tokenizer.files) == {"tokenizer.json": named}


@pytest.mark.parametrize("name", ["v2", "TOK.JSON", "tok.json.bak", "tok.json"])
def test_any_name_will_do_for_a_json_file(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, byte_level())
    assert load_tokenizer(path).encode(TEXT) == load_tokenizer(path).engine.encode(TEXT).ids  # type: ignore[attr-defined]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(path).path == path


@pytest.mark.parametrize("name", ["v2", "TOK.MODEL", "spm.vocab.bin", "tok.model"])
def test_any_name_will_do_for_a_sentencepiece_model(tmp_path: Path, name: str) -> None:
    path = sentencepiece_model(tmp_path / name)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, dict(tokenizer.files)) == (300, {"tokenizer.model": path})


def test_copies_under_the_kept_names_are_the_same_tokenizer(tmp_path: Path) -> None:
    named = save(
        tmp_path / "german-32k.json",
        byte_level(("<|endoftext|>", "</s>")),
        **{"german-32k_config": {"eos_token": "</s>"}},
    )
    tokenizer = load_tokenizer(named)
    assert tokenizer.end_of_document == 1
    copies = tmp_path / "copies"
    copies.mkdir()
    for name, path in tokenizer.files.items():
        (copies / name).write_bytes(path.read_bytes())
    again = load_tokenizer(copies)
    assert (again.sha256, again.end_of_document) == (tokenizer.sha256, 1)
    (copies / "tokenizer_config.json").unlink()
    assert load_tokenizer(copies).sha256 != tokenizer.sha256, "another token ends documents"


def test_an_end_token_of_the_model_config_goes_along(tmp_path: Path) -> None:
    path = save(
        tmp_path / "tokenizer.json",
        byte_level(("<|endoftext|>", "</s>")),
        config={"eos_token_id": 1},
        special_tokens_map={"eos_token": None},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_document == 1
    assert set(tokenizer.files) == {"tokenizer.json", "config.json", "special_tokens_map.json"}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    tokenizer = load_tokenizer(path)
    assert tokenizer.end_of_document == 0
    assert "config.json" not in tokenizer.files, "it says nothing about the tokenizer then"


def test_of_two_tokenizers_in_a_directory_the_other_can_be_told(tmp_path: Path) -> None:
    save(tmp_path / "tokenizer.json", byte_level())
    sentencepiece_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.path == tmp_path / "tokenizer.json"
    assert not_used_beside(tokenizer, tmp_path) == ["tokenizer.model"]
    assert not_used_beside(tokenizer, tokenizer.path) == [], "it was named"


def test_links_are_followed_and_companions_lie_beside_the_link(tmp_path: Path) -> None:
    blob = save(tmp_path / "blobs" / "3f2a", byte_level(("<|endoftext|>", "</s>")))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "tokenizer.json").symlink_to(blob)
    (snapshot / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert load_tokenizer(snapshot).end_of_document == 1


def test_what_can_not_be_loaded_is_said_with_its_name(tmp_path: Path) -> None:
    tok = tmp_path / "tok"
    save(tok / "german-32k.json", byte_level())
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.model", "B.MODEL"):
        sentencepiece_model(two / name)
    dangling = tmp_path / "dangling"
    dangling.mkdir()
    (dangling / "tokenizer.json").symlink_to("gone.json")
    os.mkfifo(tmp_path / "pipe.json")
    files = {
        "cut.json": (tok / "german-32k.json").read_bytes()[:500],
        "latin.json": b'{"a": "\xe9"}',
        "list.json": b"[1]",
        "empty.json": b"",
        "empty.model": b"",
        "text": b"not a model",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cases = {
        "none.json": r"none\.json does not exist",
        "none.json/tokenizer.json": "does not exist",
        "tok": r"neither a tokenizer\.json nor a \.model.*name the file if one of german-32k\.json",
        "two": r"two has 2 \.model files \(B\.MODEL, a\.model\); name the one to use",
        "dangling": r"tokenizer\.json is a link to gone\.json, which does not exist",
        "pipe.json": r"pipe\.json is not a file",
        "cut.json": r"cut\.json is not a tokenizer of the tokenizers library",
        "latin.json": r"latin\.json is not UTF-8 text \(byte 7\)",
        "list.json": r"list\.json is not a tokenizer of",
        "empty.json": r"empty\.json is not a tokenizer of",
        "empty.model": r"empty\.model is not a sentencepiece model",
        "text": "text is not a sentencepiece model",
        "x" * 300: "can't be read: File name too long",
    }
    for name, said in cases.items():
        with pytest.raises(DataError, match=rf"(?s)^data\.tokenizer: .*{said}"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=rf"^{tmp_path}/text is not"):
        load_tokenizer(tmp_path / "text", key=None)


# --- The token that ends documents ---------------------------------------------------------------


def test_null_says_nothing_and_the_next_file_is_asked(tmp_path: Path) -> None:
    engine = byte_level(("<|endoftext|>", "</s>"))
    save(
        tmp_path / "tokenizer.json",
        engine,
        tokenizer_config={"eos_token": None},
        special_tokens_map={"eos_token": "</s>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_document == 1
    assert "special_tokens_map.json" in tokenizer.end_of_document_from
    (tmp_path / "special_tokens_map.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.end_of_document, tokenizer.end_of_document_from) == (
        0,
        "'<|endoftext|>', by its name",
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config", {"eos_token": "<|im_end|>"}, "'<|im_end|>', which is not a token of"),
        ("tokenizer_config", {"eos_token": 7}, "is 7, which is not a token"),
        ("tokenizer_config", {"eos_token": ""}, "is '', which is not a token"),
        ("special_tokens_map", {"eos_token": {"content": "<x>"}}, "'<x>', which is not a token"),
        ("generation_config", {"eos_token_id": 300}, "is 300, and"),
        ("generation_config", {"eos_token_id": [4000, 0]}, "is [4000, 0], and"),
        ("generation_config", {"eos_token_id": []}, "is [], and"),
        ("generation_config", {"eos_token_id": True}, "is True, and"),
        ("generation_config", {"eos_token_id": -1}, "is -1, and"),
        ("config", {"eos_token_id": "0"}, "is '0', and"),
        ("tokenizer_config", [1], "is not a JSON object"),
    ],
)
def test_an_end_token_that_is_not_there_is_an_error(
    tmp_path: Path, name: str, content: object, said: str
) -> None:
    save(tmp_path / "tokenizer.json", byte_level(("<|endoftext|>",)), **{name: content})
    with pytest.raises(DataError) as raised:
        load_tokenizer(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path / f"{name}.json") in str(raised.value)


def test_an_end_token_in_broken_json_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "tokenizer.json", byte_level(("<|endoftext|>",)))
    for content in (b"{not json", b"[" * 100_000, b'{"eos_token": "\xff"}'):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json is not (JSON|UTF-8)"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config"])
def test_an_end_token_behind_a_link_that_leads_nowhere_is_an_error(
    tmp_path: Path, name: str
) -> None:
    path = save(tmp_path / "tokenizer.json", byte_level(("<|endoftext|>",)))
    (tmp_path / f"{name}.json").symlink_to("gone.json")
    with pytest.raises(DataError, match=rf"{name}\.json is a link to gone\.json, which is not a"):
        load_tokenizer(path)
    (tmp_path / f"{name}.json").unlink()
    os.mkfifo(tmp_path / f"{name}.json")
    with pytest.raises(DataError, match=rf"{name}\.json is there and is not a file"):
        load_tokenizer(path)


def test_a_link_that_is_not_asked_is_not_copied(tmp_path: Path) -> None:
    path = save(tmp_path / "tokenizer.json", byte_level(), tokenizer_config={"eos_token": "</s>"})
    (tmp_path / "generation_config.json").symlink_to("gone.json")
    assert set(load_tokenizer(path).files) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_token_of_number_0_is_advised_too(tmp_path: Path) -> None:
    engine = byte_level(("<|endoftext|>",))
    save(tmp_path / "tokenizer.json", engine, tokenizer_config={"eos_token": "<eos>"})
    assert load_tokenizer(save(tmp_path / "plain.json", engine)).end_of_document == 0
    with pytest.raises(DataError, match=r"one that is, such as '<\|endoftext\|>', or add it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("ids", "said"), [([1, 0], "'</s>', first eos_token_id of"), ([1], "'</s>', eos_token_id of")]
)
def test_of_several_end_tokens_the_first_is_taken_and_said_to_be(
    tmp_path: Path, ids: list[int], said: str
) -> None:
    engine = byte_level(("<|endoftext|>", "</s>"))
    save(tmp_path / "tokenizer.json", engine, generation_config={"eos_token_id": ids})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_document == 1
    assert tokenizer.end_of_document_from == f"{said} {tmp_path}/generation_config.json"


def test_without_any_end_token_it_says_where_to_write_one(tmp_path: Path) -> None:
    save(tmp_path / "german.json", byte_level(()))
    with pytest.raises(DataError, match=r'write \{"eos_token": "\.\.\."\} into .*german_config\.j'):
        load_tokenizer(tmp_path / "german.json")
    sentencepiece_model(tmp_path / "t.model", eos_id=-1)
    with pytest.raises(DataError, match=r"t\.model has no end-of-sentence piece"):
        load_tokenizer(tmp_path / "t.model")


# --- Tokens --------------------------------------------------------------------------------------


def test_gaps_between_ids_are_no_tokens(tmp_path: Path) -> None:
    tree = json.loads(byte_level().to_str())
    count = len(tree["model"]["vocab"])
    tree["model"]["vocab"]["the"] = 5000
    path = tmp_path / "far.json"
    path.write_text(json.dumps(tree))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 5001
    assert len(tokenizer.ids) == count
    assert tokenizer.ids[-1] == 5000
    assert 4999 not in tokenizer.ids
    with pytest.raises(DataError, match=r"numbered up to 5000.*vocab_size to at least 5001"):
        check_vocabulary(tokenizer, 512)


def test_a_tokenizer_larger_than_the_model_that_is_loaded(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    large = tmp_path / "large.json"
    byte_level(size=300).save(str(large))
    fix = "use the tokenizer of the model that checkpoint.load_from names{}, or give the model new "
    with pytest.raises(DataError, match=re.escape(fix.format(""))):
        check_vocabulary(load_tokenizer(large), 259, str(model))
    byte_level(size=259).save(str(model / "tokenizer.json"))
    own = f' (data.tokenizer = "{model}")'
    with pytest.raises(DataError, match=re.escape(fix.format(own))) as caught:
        check_vocabulary(load_tokenizer(large), 259, str(model))
    assert 'set model.vocab_size to at least 299 and checkpoint.load_new_tokens = "mean".' in str(
        caught.value
    )


def test_an_added_token_that_the_library_numbers_anew_is_an_error(tmp_path: Path) -> None:
    tree = json.loads(byte_level().to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tree["added_tokens"].append({"id": 5000, "content": "<far>", "special": True, **flags})
    path = tmp_path / "far.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"'<far>' the number 5000, and the tokenizers library"):
        load_tokenizer(path)


def test_a_tokenizer_that_works_at_random_is_refused(tmp_path: Path) -> None:
    engine = byte_level()
    engine.model.dropout = 0.1
    with pytest.raises(DataError, match=r'tokenises at random \("dropout"'):
        load_tokenizer(save(tmp_path / "t.json", engine))
