"""What the checks found: lines with a status, and how they are printed."""

import json
from dataclasses import asdict, dataclass, field

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        status: ``ok``, ``warning`` (a run works, but perhaps not as wanted) or ``error``
        check: what was checked
        found: what was found
        remedy: what to do about it; empty where *found* says it already or there is nothing to do
        values: numbers behind it by name, for the JSON output
    """

    status: str
    check: str
    found: str
    remedy: str = ""
    values: dict = field(default_factory=dict)


@dataclass
class Report:
    """All findings, and what could not be checked: check -> what it needs."""

    lines: list = field(default_factory=list)
    not_checked: dict = field(default_factory=dict)

    def count(self, status):
        return sum(line.status == status for line in self.lines)

    def table(self):
        width = max(map(len, [*(line.check for line in self.lines), *self.not_checked]))
        rows = []
        for line in self.lines:
            rows.append(f"{line.status:<8} {line.check:<{width}}  {line.found}")
            if line.remedy:
                rows.append(f"{'':<8} {'':<{width}}  remedy: {line.remedy}")
        for check, needs in self.not_checked.items():
            rows.append(f"{'-':<8} {check:<{width}}  not checked: needs {needs}")
        counts = [
            f"{self.count(s)} {s}{'s' * (s != OK and self.count(s) != 1)}"
            for s in (OK, WARNING, ERROR)
        ]
        return "\n".join([*rows, ", ".join(counts)])

    def json(self):
        content = {
            "lines": [asdict(line) for line in self.lines],
            "not_checked": self.not_checked,
            "warnings": self.count(WARNING),
            "errors": self.count(ERROR),
        }
        return json.dumps(content, indent=2, ensure_ascii=False)
