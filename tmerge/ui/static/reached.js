// What scrolls is scrolled with the keyboard too: tables of a Markdown text and editors, whose markup is not ours.
(() => {
  let later = 0;
  const reach = () => {
    later = 0;
    for (const node of document.querySelectorAll("#push-markdown table, .cm-content")) {
      if (node.tabIndex !== 0) node.tabIndex = 0;
    }
  };
  const soon = () => { later ||= setTimeout(reach, 300); };
  new MutationObserver(soon).observe(document, { childList: true, subtree: true });
})();
