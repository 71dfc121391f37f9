"""The quickstart's last step: its headline numbers into summary.json, the report with them, a few lines on the console.

python tools/quickstart_summary.py runs/quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rl.observability.report import write_report


def headline(out: Path) -> dict[str, Any]:
    rl = json.loads((out / "summary.json").read_text())
    sft = json.loads((out / "sft" / "summary.json").read_text())
    start, end = rl["eval_start"], rl["eval_end"]
    return rl | {
        "accuracy_sft": start["accuracy"],
        "accuracy_rl": end["accuracy"],
        "accuracy_sft_greedy": start["accuracy_greedy"],
        "accuracy_rl_greedy": end["accuracy_greedy"],
        "accuracy_sft_forced": start["accuracy_forced"],
        "accuracy_rl_forced": end["accuracy_forced"],
        "seconds_setup": int((out / "seconds_setup").read_text()),
        "seconds_sft": sft["seconds_sft"],
    }


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    summary = headline(out)
    seconds = {name: round(summary[f"seconds_{name}"]) for name in ("setup", "sft", "rl")}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report = write_report(out)
    print(
        f"\nheld-out accuracy      SFT {summary['accuracy_sft']:.1%}  ->  RL {summary['accuracy_rl']:.1%}"
        f"\n  greedy               SFT {summary['accuracy_sft_greedy']:.1%}  ->  RL {summary['accuracy_rl_greedy']:.1%}"
        f"\n  made to work it out  SFT {summary['accuracy_sft_forced']:.1%}  ->  RL {summary['accuracy_rl_forced']:.1%}"
        f"\nseconds                set-up {seconds['setup']}, SFT {seconds['sft']}, RL {seconds['rl']}"
        f"\nreport                 {report}"
    )


if __name__ == "__main__":
    main()
