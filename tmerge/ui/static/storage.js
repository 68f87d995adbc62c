// Whether this page is lent its cookies, asked as it opens: whoever asks in a click may open no window after it.
window.cookiesLent = true;
document.hasStorageAccess?.().then((lent) => { window.cookiesLent = lent; });
// Where a browser lends a page in an iframe no storage, asking for it is an error, on which the whole page would stop.
try {
  window.localStorage.length;
} catch {
  const kept = new Map();
  const storage = {
    getItem: (key) => kept.get(String(key)) ?? null,
    setItem: (key, value) => { kept.set(String(key), String(value)); },
    removeItem: (key) => { kept.delete(String(key)); },
    clear: () => { kept.clear(); },
    key: (place) => [...kept.keys()][place] ?? null,
    get length() { return kept.size; },
  };
  Object.defineProperty(window, "localStorage", { value: storage, configurable: true });
}
// What is kept under a key as JSON; an object without anything where there is none that can be read.
window.keptJson = (key) => {
  try { return Object(JSON.parse(localStorage.getItem(key))); } catch { return {}; }
};
// The open tab, kept by the browser alone: a page that is left at once, or whose server is busy, is found on it too.
// Until a page has begun with the last one, what is selected is nobody's doing.
window.openTab = {
  begun: false,
  begin() { this.begun = true; },
  last: () => localStorage.getItem("tmerge-tab") ?? "",
  keep(tab) { if (this.begun) localStorage.setItem("tmerge-tab", tab); },
};
