"""The 1/W curve: tokens per joule against the context window for H100 and B200, with the ideal 1/W line."""

import csv
import io

from _tables import RESULTS

from fleetopt_jax.core.files import write_whole
from fleetopt_jax.published.tables import reproduce
from fleetopt_jax.report.figures import one_over_w_figure, save_figure


def main() -> None:
    cells = {(cell.row, cell.column): cell for cell in reproduce([1]).tables["1"]}
    windows = sorted({int(row) for row, _ in cells})
    exact = {gpu: [cells[str(w), f"{gpu}_tok_per_w"].exact for w in windows] for gpu in ("h100", "b200")}
    published = {gpu: [cells[str(w), f"{gpu}_tok_per_w"].published for w in windows] for gpu in exact}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["window_tokens", *(f"{gpu}_tok_per_j" for gpu in exact), *(f"{gpu}_kept" for gpu in exact)])
    for i, window in enumerate(windows):
        kept = [f"{values[i] / values[i - 1]:.9g}" if i else "" for values in exact.values()]
        writer.writerow([window, *(f"{values[i]:.9g}" for values in exact.values()), *kept])
    write_whole(RESULTS / "one_over_w.csv", text.getvalue())
    save_figure(one_over_w_figure(windows, exact, published), RESULTS / "one_over_w")
    print(text.getvalue())


if __name__ == "__main__":
    main()
