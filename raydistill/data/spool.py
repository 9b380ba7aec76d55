"""Rows that wait on the local disk between two passes, in the order in which they were added.

They stand in the system's temporary folder, compressed, and go with the object. Memory holds a few hundred of them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

CHUNK_ROWS = 256


class Spool:
    """Takes rows of a schema's columns; read as often as wanted once it is closed."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._rows = schema, list[tuple[Any, ...]]()
        folder = tempfile.mkdtemp(prefix="raydistill-rows-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._path = Path(folder) / "rows.arrow"
        self._writer = pa.ipc.new_stream(
            str(self._path), schema, options=pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        )

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) == CHUNK_ROWS:
            self._write()

    def close(self) -> None:
        if self._rows:
            self._write()
        self._writer.close()

    def _write(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every row by its columns' names, in order."""
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield from batch.to_pylist()
