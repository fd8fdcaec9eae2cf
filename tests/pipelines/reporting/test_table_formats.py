"""Tables in Markdown and LaTeX."""

from pipelines.reporting.table_formats import Table, latex, markdown


def test_special_letters_are_text_in_latex_and_markdown() -> None:
    table = Table("50 % of a_b", ["x|y", "n"], [[r"\$1 & ~{z}^#", "–"]], frozenset({(0, 1)}))
    tex = latex(table)
    assert r"50 \% of a\_b" in tex
    assert r"\textbackslash{}\$1 \& \textasciitilde{}\{z\}\textasciicircum{}\# & \textbf{--} \\" in tex
    assert r"x\|y" in markdown(table)
