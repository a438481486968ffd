"""The report of a run: what a person reads when training is over, made from the files of the run folder alone.

`build_report` writes one self-contained HTML file, `summary_table` gives the short table for the terminal. Imports no
torch: a report can be made on a laptop from a copied run folder, of a run that is still going, or of one that died.
"""

from moba_train.report.build import build_report
from moba_train.report.summary import summary_table

__all__ = ["build_report", "summary_table"]
