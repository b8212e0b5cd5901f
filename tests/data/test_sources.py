"""Sources: what is read, under which keys, and what bad input says."""

from __future__ import annotations

import gzip
import json
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.documents import cut_long_text, read_jsonl
from stagewise.data.embedded import embedded_documents, embedded_manifest, embedded_names
from stagewise.data.sources import SourceSpec, plan_units, read_source, read_unit

TEXTS = [f"document {i} says {'é東' * (i % 3)} {'word ' * i}" for i in range(12)]


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    return data


def write_jsonl(path, records):
    path.write_bytes(compressed("".join(json.dumps(r) + "\n" for r in records).encode(), path.suffix))


def texts_of(**fields):
    return [document.text for document in read_source(SourceSpec("s", **fields))]


def test_embedded_corpus_has_sources_and_documentation_but_no_tests_and_no_packages():
    names = [name for name, _ in embedded_names()]
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__", "idle_test"}
    topics = [d for d in embedded_documents(["pydoc_data/topics.py"])]
    assert any(d.key == "pydoc_data/topics/assert.rst" and 'The "assert" statement' in d.text for d in topics)
    assert all(d.key.endswith(".rst") for d in topics)


def test_embedded_manifest_is_reproducible_and_names_the_python_version():
    manifest = embedded_manifest()
    assert manifest == embedded_manifest()
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["documents"] > 400 and manifest["bytes"] > 5_000_000 and len(manifest["content_sha256"]) == 64


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_jsonl_read_the_same_compressed_or_not(tmp_path, suffix):
    write_jsonl(tmp_path / f"a.jsonl{suffix}", [{"text": text} for text in TEXTS])
    assert texts_of(kind="jsonl", path=str(tmp_path / "*.jsonl*")) == TEXTS
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed(TEXTS[5].encode(), suffix))
    assert texts_of(kind="text", path=str(tmp_path)) == [TEXTS[5]]


def test_parquet_reads_columns_and_row_groups(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": TEXTS, "n": list(range(12))}), tmp_path / "a.parquet", row_group_size=5)
    spec = SourceSpec("s", kind="parquet", path=str(tmp_path / "a.parquet"), text_key="body")
    units = plan_units(spec, unit_bytes=100)
    assert len(units) == 3
    documents = [document for unit in units for document in read_unit(spec, unit)]
    assert [document.text for document in documents] == TEXTS
    assert documents == list(read_source(spec))


def test_columns_are_joined_or_filled_into_a_template(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}])
    path = str(tmp_path / "a.jsonl")
    assert texts_of(kind="jsonl", path=path, text_key=["question", "answer"]) == ["1+1?\n\n2"]
    assert texts_of(kind="jsonl", path=path, text_key="Q: {question}\nA: {answer}") == ["Q: 1+1?\nA: 2"]


def test_keys_do_not_depend_on_where_the_files_lie(tmp_path):
    first, second = tmp_path / "one", tmp_path / "deeper" / "two"
    (first / "sub").mkdir(parents=True)
    write_jsonl(first / "sub" / "a.jsonl", [{"text": text} for text in TEXTS])
    (first / "b.jsonl").write_text('{"text": "more"}\n')
    shutil.copytree(first, second)
    keys = [
        [document.key for document in read_source(SourceSpec("s", kind="jsonl", path=str(path)))]
        for path in (first, second)
    ]
    assert keys[0] == keys[1] and len(set(keys[0])) == 13


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), unit=st.integers(1, 200), last=st.booleans())
def test_byte_ranges_of_a_jsonl_file_read_every_line_once(tmp_path_factory, lengths, unit, last):
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    texts = [f"{i}:" + "é" * length for i, length in enumerate(lengths)]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts))
    path.write_bytes((lines + ("\n" if last else "")).encode())
    spec = SourceSpec("s", kind="jsonl", path=str(path))
    parts = [document for one in plan_units(spec, unit) for document in read_unit(spec, one)]
    assert [document.text for document in parts] == texts
    assert parts == list(read_jsonl(path, "a.jsonl"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["x" * 9000, "a b", "\n\n", "\n", "é" * 40_000]), max_size=40))
def test_parts_of_a_long_text_join_to_the_text(pieces):
    text = "".join(pieces)
    parts = cut_long_text(text)
    assert "".join(parts) == text
    assert all(len(part) <= 64 * 1024 for part in parts)


def test_a_separator_cuts_documents_exactly(tmp_path):
    (tmp_path / "a.txt").write_text("one<|doc|>two<|doc|>three")
    assert texts_of(kind="text", path=str(tmp_path / "a.txt"), separator="<|doc|>") == ["one", "two", "three"]


def test_a_limit_takes_the_first_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert texts_of(kind="jsonl", path=str(tmp_path / "a.jsonl"), limit=5) == TEXTS[:5]


def test_hub_dataset_streams_with_a_mapped_column(tmp_path):
    for part in range(2):
        write_jsonl(tmp_path / f"train-{part}.jsonl", [{"body": text} for text in TEXTS[part::2]])
    spec = SourceSpec("s", kind="hub", repo=str(tmp_path), text_key="body")
    units = plan_units(spec)
    documents = [document for unit in units for document in read_unit(spec, unit)]
    assert len(units) == 2 and len({document.key for document in documents}) == 12
    assert sorted(document.text for document in documents) == sorted(TEXTS)
    with pytest.raises(ValueError, match="no column 'text'; the columns are: body"):
        list(read_source(SourceSpec("s", kind="hub", repo=str(tmp_path))))


def test_hub_source_with_a_path_reads_the_local_copy(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.zst", [{"text": "local"}])
    assert texts_of(kind="hub", repo="somebody/something", path=str(tmp_path)) == ["local"]


def test_missing_datasets_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"stagewise\[data\]"):
        list(read_source(SourceSpec("s", kind="hub", repo="somebody/something")))


@pytest.mark.parametrize("path", ["nowhere.txt", "none/*.txt"])
def test_missing_files_are_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"source 's'.*(nowhere|none)"):
        list(read_source(SourceSpec("s", kind="text", path=str(tmp_path / path))))


def test_folder_without_such_files_says_so(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds no jsonl files"):
        list(read_source(SourceSpec("s", kind="jsonl", path=str(tmp_path))))


def test_invalid_utf8_names_file_and_byte_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes("héllo ".encode() + b"\xff\xfe rest")
    with pytest.raises(ValueError, match=r"a\.txt: invalid UTF-8 at byte 7"):
        texts_of(kind="text", path=str(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: invalid UTF-8 at byte 27"):
        texts_of(kind="jsonl", path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "a.jsonl:3: not a JSON line"),
        ("[1, 2]", "a.jsonl:3: a JSON object is needed, not list"),
        ('{"body": "x", "id": 1}', "a.jsonl:3: no column 'text'; the columns are: body, id"),
        ('{"text": 5}', "a.jsonl:3: column 'text' holds int"),
    ],
)
def test_bad_jsonl_line_names_file_and_line_whatever_the_unit(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n' + line + "\n")
    spec = SourceSpec("s", kind="jsonl", path=str(path))
    for unit_bytes in (20, 1 << 20):
        with pytest.raises(ValueError) as caught:
            [list(read_unit(spec, unit)) for unit in plan_units(spec, unit_bytes)]
        assert message in str(caught.value)


def test_missing_parquet_column_lists_the_columns_and_a_cut_file_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "id": list(range(12))}), path)
    with pytest.raises(ValueError, match="no column 'text'; the columns are: body, id"):
        texts_of(kind="parquet", path=str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file"):
        texts_of(kind="parquet", path=str(path), text_key="body")


def test_compressed_file_cut_short_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(OSError, match=r"a\.jsonl\.gz: cannot be read"):
        texts_of(kind="jsonl", path=str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "csv"}, "unknown kind 'csv'"),
        ({"kind": "text"}, "needs a path"),
        ({"kind": "hub"}, "needs repo"),
        ({"kind": "embedded", "share": 0.0}, "share must be above 0"),
    ],
)
def test_impossible_source_descriptions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceSpec("s", **fields)
