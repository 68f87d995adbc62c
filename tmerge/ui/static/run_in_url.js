(link) => {
  // The run's link: in the address bar, so that a reload comes back to it, and in the field that it is copied from.
  const id = window.runOf(link);
  const url = new URL(window.location.href);
  for (const name of ["tab", "repo", "run"]) { url.searchParams.delete(name); }
  if (id) { url.searchParams.set("run", id); }
  window.history.replaceState(null, "", url);
  if (window.parent !== window) {
    // A Space's page may take it over into its own address.
    window.parent.postMessage({ queryString: id ? "run=" + id : "", hash: "" }, "https://huggingface.co");
  }
  return id && id === link ? url.origin + url.pathname + "?run=" + id : link;
}
