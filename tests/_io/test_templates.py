from parchgrad._io.templates import render


def test_values_are_escaped_in_pages_but_not_in_style_sheets():
    page = render("report.html", runs=[], version="<b>&", fewest=20)
    assert "Made by parchgrad &lt;b&gt;&amp;." in page
    assert 'url("a&b")' in render("explorer.css", thumbnails=['"a&b"'])
