"""Rows of JSON files and the exactness of complaints about broken ones."""

import json
import re
from pathlib import Path

import pytest

from persona.data.rows import CHUNK, read_json, read_jsonl
from persona.errors import UserError


def values(path: Path, prefix: str = "item") -> list:
    return [value for _, value, _ in read_json(path, prefix)]


def test_rows_equal_the_json_module_across_chunk_borders(tmp_path):
    rows = [{"id": str(i), "text": 'ä\\ "' * 50, "n": [1, 2.5, None, True]} for i in range(800)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert path.stat().st_size > 3 * CHUNK
    read = list(read_json(path, "item"))
    assert [value for _, value, _ in read] == rows
    assert [row for row, _, _ in read] == list(range(1, 801))
    assert read[-1][2] == path.stat().st_size


@pytest.mark.parametrize("padding", [0, 3000])
def test_broken_json_names_row_and_byte(tmp_path, padding):
    # The third row holds `tru}`; with padding it lies chunks behind the start of the file.
    good = json.dumps({"text": "x" * padding * 40})
    head = f"[{good}, {good}, "
    path = tmp_path / "broken.json"
    path.write_text(head + '{"a": tru}, ' + good + "]")
    with pytest.raises(UserError) as caught:
        values(path)
    message = str(caught.value)
    assert "row 3 (counted from 1)" in message and str(path) in message
    # The byte named is the first one that cannot continue the JSON so far: the brace after `tru`.
    assert int(re.search(r"byte (\d+)", message)[1]) == len(head) + len('{"a": tru')


def test_truncated_file_says_cut_off(tmp_path):
    text = json.dumps([{"a": "b" * 90_000}, {"a": "c" * 90_000}])
    path = tmp_path / "cut.json"
    path.write_text(text[:120_000])
    with pytest.raises(UserError, match=r"cut off in row 2 \(counted from 1\), at byte 120000"):
        values(path)


@pytest.mark.parametrize("text", ["", "   \n"])
def test_empty_file_is_cut_off(tmp_path, text):
    path = tmp_path / "empty.json"
    path.write_text(text)
    with pytest.raises(UserError, match="cut off in row 1"):
        values(path)


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.json"
    path.write_bytes(b'[{"a": "caf\xe9"}]')
    with pytest.raises(UserError, match="broken JSON in row 1"):
        values(path)


def test_jsonl_names_line_and_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": }\n')
    with pytest.raises(UserError, match=r"broken JSON in line 3, column 7"):
        list(read_jsonl(path))
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(UserError, match=r"line 2 is \[2\], where a JSON object should be"):
        list(read_jsonl(path))
