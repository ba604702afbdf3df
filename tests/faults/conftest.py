"""The table at the end: what was tried, what was lost, and who caught which mutant."""

from tests.faults import bench


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    said = [entry for report in reports if report.when == "call" for entry in report.user_properties]
    text = bench.table(
        (what for name, what in said if name == "fault"), (what for name, what in said if name == "mutant")
    )
    if text:
        terminalreporter.section("faults")
        terminalreporter.write_line(text)
