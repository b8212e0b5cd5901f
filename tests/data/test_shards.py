"""Token shards: what is written is read, and damage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.shards import Shard, token_dtype, write_shard, write_text_atomically


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 99), st.lists(st.integers(0, 65535), max_size=9)),
        max_size=9,
    ),
    wide=st.booleans(),
)
def test_documents_come_back_as_written(tmp_path_factory, documents, wide):
    path = tmp_path_factory.mktemp("shard") / "one"
    dtype = token_dtype(1 << 17 if wide else 1 << 16)
    counts = write_shard(path, [(key, size, np.array(ids)) for key, size, ids in documents], dtype)
    shard = Shard.open(path, dtype)
    assert counts == (len(documents), sum(len(d[2]) for d in documents), sum(d[1] for d in documents))
    assert [
        (int(record["key"]), int(record["bytes"]), shard.ids(number).tolist())
        for number, record in enumerate(shard.documents)
    ] == documents
    assert shard.tokens.dtype == dtype and dtype.itemsize == (4 if wide else 2)


def test_a_stretch_of_a_document_stops_at_its_end(tmp_path):
    shard = Shard.from_documents("s", [(0, 1, np.arange(5)), (1, 1, np.arange(10, 14))], np.dtype("<u2"))
    assert shard.ids(0, 3, 9).tolist() == [3, 4] and shard.ids(1, 1).tolist() == [11, 12, 13]


def test_a_shard_cut_short_is_refused_by_name(tmp_path):
    dtype = np.dtype("<u2")
    write_shard(tmp_path / "one", [(0, 1, np.arange(50))], dtype)
    binary = tmp_path / "one.bin"
    binary.write_bytes(binary.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"one\.bin has 90 bytes where its index promises 100"):
        Shard.open(tmp_path / "one", dtype)
    binary.unlink()
    with pytest.raises(FileNotFoundError, match=r"one\.bin is missing"):
        Shard.open(tmp_path / "one", dtype)
    index = tmp_path / "one.docs.npy"
    binary.write_bytes(b"\0" * 100)
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"one\.docs\.npy is damaged"):
        Shard.open(tmp_path / "one", dtype)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    def failing():
        yield 0, 1, np.arange(3)
        raise OSError("No space left on device")

    dtype = np.dtype("<u2")
    write_shard(tmp_path / "one", [(7, 1, np.arange(4))], dtype)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "one", failing(), dtype)
    assert Shard.open(tmp_path / "one", dtype).ids(0).tolist() == [0, 1, 2, 3]
    write_text_atomically(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "a.json", "new \ud800")
    assert (tmp_path / "a.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "one.bin", "one.docs.npy"]
