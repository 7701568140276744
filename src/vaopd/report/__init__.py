"""One static page from a run's folder, or from several: reads files, imports no model code (see docs/run_folder.md)."""

from __future__ import annotations

from vaopd.report.heat import heat_map_svg
from vaopd.report.page import write_comparison, write_heat_map, write_report

__all__ = ["heat_map_svg", "write_comparison", "write_heat_map", "write_report"]
