"""Unit conversions. The library computes in SI; only `report` and the edge convert.

`MS` is one millisecond in seconds, and so on: `ttft_s / MS` is milliseconds, `10 * KW` is watts.
"""

MS = 1e-3
US = 1e-6
NS = 1e-9
KW = 1e3
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
GIB = 1024.0**3
GB = 1e9
TFLOP = 1e12
TB = 1e12
MILLION = 1e6
