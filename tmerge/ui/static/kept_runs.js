// Runs that this browser was shown, on all its pages: id -> when, read again before it is written. Gradio's BrowserState
// is read as a page opens and written whole, so that of two pages each undid what the other had kept.
window.keptRuns = (() => {
  const KEY = "tmerge-shown-runs", MOST = 10;
  const read = () => window.keptJson(KEY);
  const newestFirst = (kept) => Object.keys(kept).sort((one, other) => kept[other] - kept[one]);
  const all = () => newestFirst(read()).slice(0, MOST).join(" ");
  // Those that are there still, the one that is shown first; what is gone has a mark. What another page was shown just now
  // is not among them.
  const keep = (words) => {
    const said = words.split(" ").filter(Boolean), kept = read(), now = Date.now();
    const known = said.filter((id) => !id.startsWith("!"));
    for (const id of said) if (id.startsWith("!")) delete kept[id.slice(1)];
    if (known.some((id) => !(kept[known[0]] >= (kept[id] ?? 0)))) kept[known[0]] = now;
    known.forEach((id, place) => { kept[id] ??= now - place; });
    const last = newestFirst(kept).slice(0, MOST).map((id) => [id, kept[id]]);
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(last)));
    return all();
  };
  // Told to a page when another one writes.
  window.addEventListener("storage", (event) => {
    const field = document.querySelector("#kept-runs :is(input, textarea)");
    if (!field || (event.key !== KEY && event.key !== null)) return;
    field.value = all();
    field.dispatchEvent(new Event("input", { bubbles: true }));
  });
  return { all, keep };
})();
