"""README's sample of a log: what a start says of the table in docs/example.json, so that it cannot
go stale.

`python -m tests.sample` writes it anew. `make calibrate ARGS="--output docs/example.json"` made the
table.
"""

import re
from pathlib import Path

from adaptive_moe.report.text import bucket_table, start_line, table_lines
from adaptive_moe.store.text import read_any

ROOT = Path(__file__).parents[1]
README, TABLE = ROOT / "README.md", ROOT / "docs" / "example.json"
MARKS = "<!-- sample -->\n", "<!-- end of sample -->\n"
# Counts whose rows are shown.
SHOWN = ("tokens", "512", "909", "939")


def sample() -> str:
    """The lines as README has them."""
    (stored,) = read_any(TABLE)
    table = stored.table
    rows = [row for row in bucket_table(table) if row.split()[0] in SHOWN]
    lines = [start_line([table]), *table_lines(table, with_counts=False), *rows]
    return "".join(f"    {line}\n" for line in lines)


def shown(text: str) -> str:
    """What stands between the marks."""
    begin, end = MARKS
    return text.partition(begin)[2].partition(end)[0].strip("\n") + "\n"


if __name__ == "__main__":
    begin, end = MARKS
    text = README.read_text(encoding="utf-8")
    new = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{sample()}\n{end}", text, flags=re.DOTALL)
    README.write_text(new, encoding="utf-8")
