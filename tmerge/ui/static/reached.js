// Two things that Gradio's components leave out. What scrolls is scrolled with the keyboard too: tables of a Markdown text,
// and editors. And a plot that was drawn while its tab was hidden, at a width of its own, is fitted when it is shown.
(() => {
  const fit = new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width) window.dispatchEvent(new Event("resize"));
  });
  // At once, before anything else can run: a key pressed in between would find nothing to scroll.
  const reach = () => {
    for (const node of document.querySelectorAll("#push-markdown table, .cm-content")) {
      if (node.tabIndex !== 0) node.tabIndex = 0;
    }
    // Observed once, however often it is said.
    const map = document.getElementById("run-map");
    if (map) fit.observe(map);
  };
  new MutationObserver(reach).observe(document, { childList: true, subtree: true });
})();
