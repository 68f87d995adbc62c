// What has to be mended stands at its field, once: the first of its places that is in sight, else here.
const line = document.createElement("p");
line.id = "problem";
let said = {}, field = null, later = 0;

const place = () => {
  const at = (said.at || []).map((id) => document.getElementById(id)).find((node) => node && node.checkVisibility());
  const under = at || element;
  if (line.parentElement === under) return;
  if (field) for (const name of ["aria-invalid", "aria-describedby"]) field.removeAttribute(name);
  field = at ? at.querySelector("input, textarea, .cm-content") : null;
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", line.id);
  }
  under.append(line);
};
const take = () => {
  said = props.value ? JSON.parse(props.value) : {};
  line.textContent = said.line || "\u00a0";
  line.classList.value = said.bad ? "note bad" : "note";
  line.setAttribute("role", said.bad ? "alert" : "status");
  // Until somebody says that it can be read again.
  if (said.unread !== null) line.dataset.unread = String(Boolean(said.unread));
  place();
  // The button that was pressed may be a page away.
  if (said.seek && line.parentElement !== element) line.scrollIntoView({ block: "center" });
};
// A fold that is closed takes its fields out of sight, and the line with them; one that is opened brings them.
const soon = () => { if (said.line) later ||= setTimeout(() => { later = 0; place(); }, 200); };
new MutationObserver(soon)
  .observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["class", "style"] });
watch("value", take);
take();
