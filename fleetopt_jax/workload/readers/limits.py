"""How much of a file is read: a file never decides how much memory or time it takes."""

from fleetopt_jax.core.files import MIB

MAX_TOKENS = 1e9  # of a request
MAX_SUM_TOKENS = 1e15  # of a row that sums requests
MAX_REQUESTS = 100_000_000  # 2.4 GB of lengths and times
MAX_KEPT_ROWS = 2_000_000  # of requests that are kept one by one; more are counted as they pass
MAX_KEPT_BLOCKS = 2**24  # of their prompts, by hashes, that are kept; of more a sample
MAX_PASSED_ROWS = 4_000_000_000  # and of those
MAX_FILES = 100_000  # of a folder or a pattern
MAX_TRACE_BYTES = 2**16 * MIB  # unpacked, of one file
MAX_WHOLE_BYTES = 1024 * MIB  # of a file that cannot be read in pieces: a Parquet or zip file, packed or from a pipe
MAX_JSON_BYTES = 256 * MIB  # of a JSON document that is no list of records; Python's objects are ten times that
MAX_CDF_BYTES = 64 * MIB  # a knot for each of a million lengths is half of it
MAX_TIME_S = 1e20
PIECE_BYTES = 8 * MIB  # of text, read at once; also the longest line, and the longest record of a list
PIECE_ROWS = 2**18  # of Parquet
RECORD_ROWS = 2**16  # of records that Python reads
FIRST_LINES = 100  # of a jsonl file or a list of records: those that tell its columns
MAX_NESTING = 8  # of a record, of which columns are listed
MAX_NAMES = 20_000  # of columns
