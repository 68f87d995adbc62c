// Names that were typed for runs' repos: a run's id -> the name, until it has been pushed there. Kept by the browser alone,
// letter by letter, as a page may be left at any of them. A sign-in brings one in the page's address: where it comes back,
// the browser may keep nothing of what it kept before.
window.runOf = (link) => (link && link.includes("run=") ? new URL(link).searchParams.get("run") : link);
window.typedRepos = (() => {
  const KEY = "tmerge-repos", MOST = 10;
  const all = () => window.keptJson(KEY);
  // One that is as it was proposed was not typed.
  const keep = (run, proposed, typed) => {
    if (!run) return;
    const { [run]: before, ...others } = all(), name = typed.trim();
    const last = Object.entries(others).slice(1 - MOST);
    if (name && name !== proposed) last.push([run, name]);
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(last)));
  };
  const forget = (run, name) => { if (all()[run] === name) keep(run, "", ""); };
  const brought = new URLSearchParams(window.location.search);
  if (brought.get("repo")) keep(brought.get("run"), "", brought.get("repo"));
  return { all, keep, forget };
})();
