"""One section a file: what was found, the query that finds it, and its blocks. Imports no renderer.

A new section is a file with a `SECTION` (`trajrec.replay.report.section`) and its line here; reports have the sections
in this order.
"""

from trajrec.replay.report.sections import (
    comparison,
    groups,
    matrix,
    statistics,
    suspicions,
    timeline,
    top,
    validation,
    why,
)

SECTIONS = (
    top.SECTION,
    groups.SECTION,
    why.SECTION,
    statistics.SECTION,
    matrix.SECTION,
    suspicions.SECTION,
    timeline.SECTION,
    comparison.SECTION,
    validation.SECTION,
)
