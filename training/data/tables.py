"""TABLES: parquet files with a column of encoded images, of which only the end is read to know what is in them."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_pipeline.decode import Payload, failure_reason
from training.data import stores
from training.data.stores import ShardError, StoredFile

FOOTER = 2**16  # bytes at the end of a parquet file that are read first; its footer is seldom larger


def read_footer(file: StoredFile, stopped: threading.Event) -> tuple[Any, str] | None:
    """The metadata of a parquet file and their sha256; None if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    start = max(0, file.size - FOOTER)
    tail = stores.patiently(file.name, lambda: stores.read(file.url, start, file.size), stopped)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        return None
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        if length > file.size:
            return None
        tail = stores.patiently(file.name, lambda: stores.read(file.url, file.size - length, file.size), stopped)
    try:
        metadata = parquet.read_metadata(io.BytesIO(tail))
    except (pyarrow.ArrowException, OSError):
        return None
    return metadata, hashlib.sha256(tail[-length:]).hexdigest()


def features_of(file: StoredFile, metadata: Any) -> Any:
    """Its columns, as the library datasets has them."""
    import datasets

    try:
        return datasets.Features.from_arrow_schema(metadata.schema.to_arrow_schema())
    except Exception as error:  # whatever a broken schema raises
        raise ShardError(f"{file.name}: its columns cannot be read: {failure_reason(error)}") from error


def type_of(metadata: Any, column: str) -> Any:
    """The type of a column, as pyarrow has it."""
    return metadata.schema.to_arrow_schema().field(column).type


def table_rows(path: Path, column: str) -> Iterator[tuple[str, Payload]]:
    """(name, encoded image) of each row."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        row = 0
        for batch in table.iter_batches(64, columns=[column], use_threads=False):
            for cell in batch.column(0).to_pylist():
                name = Path(cell.get("path") or "").name if cell else ""
                content = (cell or {}).get("bytes")  # a text would be the path of a file of this machine
                yield f"row {row}" + (f" ({name})" if name else ""), content if isinstance(content, bytes) else None
                row += 1


def read_labels(file: StoredFile, column: str) -> list[Any]:
    """The values of a column.

    Raises:
        ShardError: it cannot be read.
    """
    from pyarrow import ArrowException, parquet

    source: Any = file.url
    if stores.is_remote(file.url):
        source = io.BufferedReader(stores.RemoteFile(file), 2**18)
    try:
        with parquet.ParquetFile(source) as table:
            values: list[Any] = table.read(columns=[column]).column(0).to_pylist()
    except (ArrowException, OSError) as error:
        raise ShardError(f"{file.name}: its column {column!r} cannot be read: {error}") from error
    return values
