(label, link, repo) => {
  // Back to this page with all that its address says, to the run and to the tab that pushes it.
  const back = new URLSearchParams(window.location.search);
  const run = link && link.includes("run=") ? new URL(link).searchParams.get("run") : "";
  if (run) { back.set("run", run); }
  if (repo) { back.set("repo", repo); }
  back.set("tab", "push");
  const way = label === "SIGNED_OUT" ? "/login/huggingface" : "/logout";
  window.parent?.postMessage({ type: "SET_SCROLLING", enabled: true }, "*");
  window.location.assign(way + "?_target_url=" + encodeURIComponent("/?" + back));
}
