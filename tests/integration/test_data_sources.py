"""Sources and tokenizers of the pre-training example: what is found, what is refused, and with which sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from tests.integration.data_jobs import message, text_recipe, texts, write_c4

from pretraining import tokenization  # isort: skip
from pretraining.sources import Source, open_source  # isort: skip
from pretraining.text_data import TextData, prepare  # isort: skip
from pretraining.tokenization import Encoder, check_vocabulary, load_tokenizer, train_tokenizer  # isort: skip

CORPUS = texts(50, seed=7)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small one."""
    return train_tokenizer(CORPUS, 300)


def write(path: Path, documents: list[str]) -> Path:
    """Documents as a file of the kind that its name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": documents, "number": list(range(len(documents)))}), path)
        return path
    lines = {
        ".txt": "\n\n".join(documents),
        ".csv": "text,label\n" + "".join(f'"{text}",1\n' for text in documents),
        ".json": json.dumps([{"text": text} for text in documents]),
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in documents),
    }[Path(name).suffix].encode()
    path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv", "a.json", "a.jsonl", "a.jsonl.gz", "[a].parquet"])
def test_every_kind_of_file_gives_its_documents(tmp_path: Path, name: str) -> None:
    """Texts come as they were written, in their order, from any position on; empty ones are left out."""
    documents = ["first", "  zweiter é", "third &amp; <br />", "fourth"]
    path = write(tmp_path / name, [*documents[:2], "", *documents[2:]])
    found = open_source(str(path)).train
    numbered = list(found.read(0))
    assert [text for _, text in numbered] == documents
    for index, (number, _) in enumerate(numbered):
        assert list(found.read(0, number)) == numbered[index:]


def test_a_folder_is_sorted_into_splits_by_names(tmp_path: Path) -> None:
    """C4's files, and others beside them, in the order of their names; validation and test are not trained on."""
    content = write_c4(tmp_path, [3, 2])
    write(tmp_path / "b.parquet", ["parquet"])
    write(tmp_path / "test-0.jsonl", ["test"])
    for folder in ("sub", ".hidden"):
        (tmp_path / folder).mkdir()
    write(tmp_path / ".hidden" / "kept.jsonl", ["what a program keeps for itself"])
    write(tmp_path / "sub" / "contestants.jsonl", ["a word that only holds test"])
    (tmp_path / "README.md").write_text("no text of the corpus")
    source = open_source(str(tmp_path))
    found = [[text for _, text in source.train.read(file)] for file in range(len(source.train.files))]
    assert sorted(found) == sorted([*content, ["parquet"], ["a word that only holds test"]])
    for file, name in enumerate(source.train.files):
        assert found[file] == [text for _, text in open_source(name).train.read(0)]
    assert len(list(source.validation.read_all())) == 12
    assert source.left_out == (str(tmp_path / "test-0.jsonl"),)
    globbed: Source = open_source(str(tmp_path / "c4-train.*"))
    assert (len(globbed.train.files), globbed.validation) == (2, None)


BAD = {
    "utf8.txt": (b"caf\xe9 \xff\n\nmore", "utf8.txt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "utf8.jsonl": (b'{"text":"caf\xe9 \xff"}\n', "utf8.jsonl cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "cut.json.gz": (gzip.compress(b'{"text":"a b"}\n' * 999)[:60], "cut.json.gz cannot be read: Compressed file ended"),
    "no.json.gz": (b"no gzip", "no.json.gz cannot be read: Not a gzipped file"),
    "line.jsonl": (b'{"text":"good"}\n{"text": oops}\n', "line.jsonl cannot be read: JSON parse error"),
    "column.jsonl": (b'{"body":"x"}\n', "column.jsonl has no column named text, only body: name it with --text-column"),
    "number.jsonl": (
        b'{"text":5}\n',
        "document 0 of .*number.jsonl holds no text in the column text, but a value of the type int",
    ),
    "empty.txt": (b"", "empty.txt is empty: remove it, or copy it again"),
    "blank.txt": (b"\n\n  \n\n", "blank.txt holds 0 documents, and at least two are needed"),
    "short.txt": (b"a\n\nb", "split of short.txt is shorter than one row of 16 tokens"),
    "bad.parquet": (b"PAR1 and no more", "bad.parquet cannot be read: Parquet magic bytes not found"),
    "none.json.gz": (gzip.compress(b""), "none.json.gz holds no documents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_sentence(tmp_path: Path, name: str) -> None:
    """What is wrong is said in one sentence that names the file, and nothing half-made is left in the cache."""
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        prepare(text_recipe(text=tmp_path / name), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not [folder for folder in (tmp_path / "cache").glob("*") if folder.suffix != ".partial"]


def test_missing_sources_get_one_sentence(tmp_path: Path) -> None:
    """A file, folder or glob that is not there, of another type, or empty."""
    assert "does not exist: it takes a file" in message(lambda: open_source(str(tmp_path / "none.txt")))
    assert "--data takes .txt, .csv" in message(lambda: open_source(str(write_md(tmp_path))))
    assert "holds no .txt, .csv" in message(lambda: open_source(str(tmp_path)))
    assert "holds no .txt, .csv" in message(lambda: open_source(str(tmp_path / "*.gz")))
    write(tmp_path / "validation.txt", ["a"])
    assert "holds no file for training" in message(lambda: open_source(str(tmp_path)))


def write_md(folder: Path) -> Path:
    """A file of a type that is not read."""
    (folder / "a.md").write_text("a")
    return folder / "a.md"


def test_without_the_hub_the_local_options_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing answers, the sentence comes at once, and says what works without."""
    # No machine has this name, whether there is a network or not.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.chdir(tmp_path)
    write_c4(tmp_path / "c4", [2])  # which is ./c4
    told = message(lambda: open_source("c4"))
    assert told.startswith("--data allenai/c4:en needs the hub, which cannot be reached (")
    for part in ("--data FOLDER with a local copy of C4 (c4-train.*.json.gz", "--data FILE", "HF_ENDPOINT"):
        assert part in told
    told = message(lambda: open_source("no-folder/of-texts"))
    assert told.startswith("--data no-folder/of-texts is no local file or folder, and needs the hub, which cannot")
    told = message(lambda: load_tokenizer("some-owner/no-such-tokenizer"))
    assert "needs the hub, which cannot be reached" in told
    assert "local folder, tokenizer.json or .model file" in told


def test_tokenizers_are_found_in_folders_and_files(tmp_path: Path, tokenizer) -> None:
    """A saved folder, its tokenizer.json, and a tokenizer.json alone encode alike."""
    expected = [ids.tolist() for ids in Encoder(tokenizer)(CORPUS)]
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "alone.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    for name in ("saved", "saved/tokenizer.json", "alone.json"):
        loaded = load_tokenizer(str(tmp_path / name))
        assert [ids.tolist() for ids in Encoder(loaded)(CORPUS)] == expected
    assert "does not exist" in message(lambda: load_tokenizer(str(tmp_path / "none")))
    (tmp_path / "broken.json").write_text("{}")
    assert "broken.json cannot be opened" in message(lambda: load_tokenizer(str(tmp_path / "broken.json")))


def test_encoding_loses_nothing_and_yields_no_special_token(tokenizer) -> None:
    """Truncation, padding and templates of a tokenizer are not applied, and a mark in the text stays text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    limited = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    texts = [*CORPUS, "a </s> b <s>"]
    for text, ids in zip(texts, Encoder(limited)(texts), strict=True):
        assert (ids[0], ids[-1]) == (0, 1)
        assert not {0, 1} & set(ids[1:-1].tolist())
        assert tokenizer.decode(ids[1:-1]) == text
    assert limited.backend_tokenizer.truncation is not None  # what is saved beside the model is untouched


def test_without_bos_the_end_alone_parts_documents(tokenizer) -> None:
    """A tokenizer without BOS closes documents only; one without EOS is refused."""
    backend = tokenizer.backend_tokenizer
    without = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert Encoder(without)(["low"])[0].tolist() == Encoder(tokenizer)(["low"])[0].tolist()[1:]


def test_tokenizer_without_eos_is_refused(tmp_path: Path, tokenizer) -> None:
    """Nothing would part the documents."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    assert "has no end-of-sequence token" in message(lambda: load_tokenizer(str(tmp_path)))


def test_vocabulary_must_fit_the_model(tokenizer) -> None:
    """Ids that a text can yield count; extra special ones, such as t5-base's beyond its 32,000, do not."""
    assert check_vocabulary(tokenizer, 300) is None
    assert "yields ids up to 299 and the model's vocabulary has 299" in message(
        lambda: check_vocabulary(tokenizer, 299)
    )
    assert "has 600 entries, of which the tokenizer uses 300" in check_vocabulary(tokenizer, 600)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in ("▁", "a", "b", "▁a"))]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=100)
    assert (len(t5), tokenization.needed_vocabulary(t5)) == (107, 7)
    assert check_vocabulary(t5, 7) is None
    assert Encoder(t5)(["a <extra_id_7> b"])[0].max() < 7


def test_stream_prepares_tokenizer_and_validation_only(tmp_path: Path) -> None:
    """Of a stream the validation split is cached up to its limit; without one, documents are held out of training."""
    write_c4(tmp_path / "c4", [400, 400])
    cache = tmp_path / "cache"
    whole = TextData.load(prepare(text_recipe(text=tmp_path / "c4", streaming=True), cache))
    assert whole.train is None
    assert whole.facts["documents"]["validation"] == 12
    limited = TextData.load(prepare(text_recipe(text=tmp_path / "c4", streaming=True, validation_tokens=100), cache))
    assert len(limited.validation) == 100 // 16
    assert whole.validation["input_ids"][:6].tolist() == limited.validation["input_ids"][:].tolist()
    held = TextData.load(prepare(text_recipe(text=str(tmp_path / "c4" / "c4-train.*"), streaming=True), cache))
    assert held.facts["documents"]["validation"] == 8  # one in a hundred
    other = text_recipe(text=tmp_path / "c4", validation_text=tmp_path / "c4" / "c4-train.00001-of-00002.json.gz")
    assert TextData.load(prepare(other, cache)).facts["documents"] == {"train": 800, "validation": 400}
