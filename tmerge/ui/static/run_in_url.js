(id) => {
  // The run's link, in the address bar: a reload comes back to it.
  const url = new URL(window.location.href);
  if (id) { url.searchParams.set("run", id); } else { url.searchParams.delete("run"); }
  window.history.replaceState(null, "", url);
}
