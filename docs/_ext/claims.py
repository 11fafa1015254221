"""The claims of the documentation, computed anew from docs/data.

python docs/_ext/claims.py           lists the claims that the stored numbers no longer support
python docs/_ext/claims.py --write   puts the new numbers into the pages and into docs/claims.csv

Words around a number are not changed: read the sentences that are listed.
"""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from stored_draws import Paired, stored

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ROOT / "docs" / "claims.csv"
KINDS = ("mean", "difference", "interval_low", "interval_high", "megabytes", "ratio", "percent")
_NUMBER = r"(?<![\d.,−-]){}(?![\d]|[.,]\d)"


@dataclass(frozen=True)
class Claim:
    """A line of docs/claims.csv."""

    id: str
    page: str  # from the root of the repository
    text: str  # of the page, in one line
    value: str  # as the text has it
    tolerance: str
    kind: str
    measure: str  # a column of the file
    method: str
    baseline: str  # empty: what is stored are differences, or the number is no comparison
    setting: str
    file: str  # in docs/data
    command: str  # makes the data

    @property
    def number(self) -> float:
        """The value as a number."""
        return float(self.value.replace("−", "-").replace(",", ""))

    def computed(self) -> float:
        """From the stored file."""
        has = stored(self.file)
        if self.kind in ("ratio", "percent"):
            mine, theirs = (has.mean(self.setting, label, self.measure) for label in (self.method, self.baseline))
            if mine is None or theirs is None:
                raise ValueError(f"{self.id}: {self.file} has no {self.measure} of both")
            return (100 if self.kind == "percent" else 1) * mine / theirs
        values = has.values(self.setting, self.method, "megabytes" if self.kind == "megabytes" else self.measure)
        paired = Paired(values)
        if self.baseline:
            paired = has.difference(self.setting, self.method, self.baseline, self.measure)
        if self.kind in ("mean", "megabytes", "difference"):
            if (self.kind == "difference") != bool(self.baseline or self.measure.startswith("points")):
                raise ValueError(f"{self.id}: only a difference has a baseline, and it has one")
            return paired.mean
        if self.kind not in KINDS:
            raise ValueError(f"{self.id}: kind is one of {', '.join(KINDS)}, not {self.kind}")
        if paired.interval is None:
            raise ValueError(f"{self.id}: an interval needs two draws")
        return paired.interval[self.kind == "interval_high"]

    def holds(self) -> bool:
        """Within the tolerance."""
        return abs(self.computed() - self.number) <= float(self.tolerance)

    def stands_in_its_text(self) -> bool:
        """Whether the number is a number of the sentence."""
        return re.search(_NUMBER.format(re.escape(self.value)), self.text) is not None

    def renewed(self) -> str:
        """The computed number, printed as the value is."""
        digits = len(self.value.partition(".")[2])
        sign = "+" if self.value.startswith("+") else ""
        return f"{self.computed():{sign},.{digits}f}".replace("-", "−")


def read(file: Path = CLAIMS) -> list[Claim]:
    """All claims."""
    with file.open(encoding="utf-8", newline="") as handle:
        return [Claim(**row) for row in csv.DictReader(handle)]


def one_line(text: str) -> str:
    """White space as single blanks, as claims have it."""
    return " ".join(text.split())


def write(claims: list[Claim]) -> None:
    """Put computed numbers where others stand: into the pages, which keep their line ends, and the list."""
    texts = {(claim.page, claim.text): claim.text for claim in claims}
    for claim in claims:
        if not claim.holds():
            place = claim.page, claim.text
            pattern = _NUMBER.format(re.escape(claim.value))
            if len(re.findall(pattern, texts[place])) != 1:
                sys.exit(f"{claim.id}: {claim.value} is not once in its sentence; write {claim.renewed()} by hand")
            texts[place] = re.sub(pattern, claim.renewed(), texts[place])
    for (page, before), after in texts.items():
        if before != after:
            file, words = ROOT / page, [re.escape(word) for word in before.split()]
            content = file.read_text(encoding="utf-8")
            found = re.search(r"\s+".join(words), content)
            if found is None:
                sys.exit(f"{page} has no sentence {before!r}")
            blanks = iter([*re.findall(r"\s+", found.group()), ""])
            new = "".join(word + next(blanks) for word in after.split())
            file.write_text(content[: found.start()] + new + content[found.end() :], encoding="utf-8")
    renewed = [
        replace(c, text=texts[c.page, c.text], value=c.value if c.holds() else c.renewed()) for c in claims
    ]  # fmt: skip
    with CLAIMS.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(Claim)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(claim) for claim in renewed)


if __name__ == "__main__":
    all_claims = read()
    stale = [claim for claim in all_claims if not claim.holds()]
    for claim in stale:
        print(f"{claim.id}: {claim.value} is now {claim.renewed()}\n  {claim.page}: {claim.text}")
    print(f"{len(stale)} of {len(all_claims)} claims do not hold")
    if stale and sys.argv[1:] == ["--write"]:
        write(all_claims)
        print("pages and docs/claims.csv have the new numbers; read the sentences above")
    elif stale:
        sys.exit(1)
