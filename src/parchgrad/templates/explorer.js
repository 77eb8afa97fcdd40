() => {
  document.documentElement.lang = "en";
  for (const said of document.querySelectorAll("#status, #steadiness")) said.setAttribute("role", "status");
  const nameGroups = () => {
    for (const group of document.querySelectorAll("fieldset")) {
      group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]")?.textContent.trim() ?? "");
    }
  };
  nameGroups();
  // Its groups exist only once it is open.
  document.querySelector("#more")?.addEventListener("click", () => setTimeout(nameGroups, 200));
  // Gradio selects the first option when the current one is chosen again.
  document.addEventListener("keydown", (event) => {
    const field = event.key === "Enter" && event.target.closest?.("#page .block");
    if (field && field.querySelector("[role=option].active[aria-selected=true]")) {
      event.preventDefault();
      event.stopPropagation();
      event.target.blur();
    }
  }, true);
}
