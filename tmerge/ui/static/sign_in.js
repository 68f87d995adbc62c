(label, link) => {
  // Back to this page with all that its address says, to the run and to the tab.
  const back = new URLSearchParams(window.location.search);
  const run = window.runOf(link), repo = window.typedRepos.all()[run];
  if (run) { back.set("run", run); }
  if (repo) { back.set("repo", repo); }
  back.set("tab", "THIS_TAB");
  const way = label === "SIGNED_OUT" ? "/login/huggingface" : "/logout";
  const address = way + "?_target_url=" + encodeURIComponent("/?" + back);
  // Where a browser lends no cookies to a page within another site's (Safari's way, and that of private windows), nobody
  // would be signed in there: the app comes back as a page of its own.
  if (window.parent !== window && !window.cookiesLent) {
    window.open(address, "_blank", "noopener");
    return;
  }
  window.parent?.postMessage({ type: "SET_SCROLLING", enabled: true }, "*");
  window.location.assign(address);
}
