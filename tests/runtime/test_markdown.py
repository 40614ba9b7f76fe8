from fullscale.runtime.markdown import escape, escape_pipes, format_table


def test_table_has_a_rule_below_its_headings():
    assert format_table(("a", "b"), [("1", "2"), ("3", "4")]) == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
        "| 3 | 4 |",
    ]


def test_escaped_text_holds_no_markup():
    assert escape("a_b*c|<d>") == r"a\_b\*c\|\<d\>"


def test_markup_keeps_all_but_its_pipes():
    assert escape_pipes("`a|b` _c_") == r"`a\|b` _c_"
