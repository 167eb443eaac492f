"""Files that a board doesn't read as they are given, by their endings, with what to do about them."""

from __future__ import annotations

from fedprune_device.data import sound_files

_TABLE_HINT = "Write it as CSV with names of columns, such as pandas.read_json(PATH, lines=True).to_csv(OUT)."
_DATABASE_HINT = "Write a table of it as CSV: sqlite3 -csv -header FILE 'SELECT ...' > OUT.csv"
_ARRAYS_HINT = "Write it with numpy.savez(path, x=..., y=...)."
_MANY_TABLES_HINT = (
    "A table is one file: --data FOLDER/NAME.csv. Join tables of the same columns into one, such as: "
    "(head -n 1 A.csv; tail -qn +2 *.csv) > ../ALL.csv"
)

# In a folder of samples: samples in another format. Where soundfile is installed, its formats are read.
WAY_OUT = {
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".dng", ".svg"), "convert them to JPEG or PNG"),
    **dict.fromkeys((".m4a", ".aac", ".wma"), "convert them to WAV"),
    **dict.fromkeys(sound_files.ENDINGS, f"{sound_files.INSTALL_HINT}, or convert them to WAV"),
}

# In a folder of samples: files each of which is a source of its own.
SINGLE_FILES = {
    **dict.fromkeys((".csv", ".tsv", ".parquet"), _MANY_TABLES_HINT),
    **dict.fromkeys((".npz", ".npy"), "Arrays are one file: --data FOLDER/NAME.npz, with x and y."),
}

# As a source: what other files are, and what to do.
OTHER_FORMS = {
    **dict.fromkeys((".xls", ".xlsx", ".ods"), ("a workbook", "Save the sheet as CSV UTF-8.")),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), ("a file of JSON", _TABLE_HINT)),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), ("a database", _DATABASE_HINT)),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), ("a pickle, which may run code", _ARRAYS_HINT)),
    ".mat": ("a file of MATLAB", _ARRAYS_HINT),
    **dict.fromkeys((".h5", ".hdf5"), ("a file of HDF5", _ARRAYS_HINT)),
    ".txt": ("a file of text", "If it is a table, name it .csv."),
}
