// Sorts the tables of the leaderboard by a click on a heading; without scripts, they keep the order of the page.
for (const table of document.querySelectorAll("#leaderboard table")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    return column === 0 ? text : Number.parseFloat(text);
  };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...body.rows].sort((first, second) => {
        const [one, other] = [value(first, column), value(second, column)];
        if (column === 0) return ascending ? one.localeCompare(other) : other.localeCompare(one);
        // What was not measured stays last.
        if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
        return ascending ? one - other : other - one;
      });
      body.append(...rows);
    });
  });
}
