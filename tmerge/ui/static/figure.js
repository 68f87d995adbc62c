const settings = __SETTINGS__;
const root = element.querySelector(".tm-figure");
const find = (name) => root.querySelector(name);
const plot = find(".tm-plot"), fault = find(".tm-fault"), message = find(".tm-message");
let picture = null, view = null, drawn = "", asked = 0, timer = 0, revision = 0;

const load = () => {
  if (!window.tmergePlotly) {
    window.tmergePlotly = new Promise((done, failed) => {
      const script = document.createElement("script");
      const base = (window.gradio_config && window.gradio_config.root) || ".";
      script.src = base.replace(/[/]+$/, "") + settings.plotly;
      script.onload = () => done(window.Plotly);
      script.onerror = () => { window.tmergePlotly = null; failed(new Error("plotly.js did not load")); };
      document.head.appendChild(script);
    });
  }
  return window.tmergePlotly;
};
const isDark = () => document.body.classList.contains("dark");
const say = (text) => { fault.textContent = text; fault.hidden = !text; };
const zoomed = () => picture && picture.map && view;

// A colour bar beside the picture takes a quarter of a phone's width: there it lies on top.
const narrow = () => plot.clientWidth < 560;
const fitted = (trace) => {
  if (!narrow() || !trace.colorbar) return trace;
  const place = { x: 0.5, xanchor: "center", y: 1, yref: "container", yanchor: "top" };
  return { ...trace, colorbar: { ...trace.colorbar, orientation: "h", thickness: 10, title: { text: "" }, ...place } };
};

// A map's view: colours as float32, and the words of every row and column.
const filled = (trace) => {
  if (!zoomed()) return trace;
  const bytes = Uint8Array.from(atob(view.z), (letter) => letter.charCodeAt(0));
  const values = new Float32Array(bytes.buffer);
  const wide = view.columns.length, [n, m] = picture.map.shape, density = picture.map.kind === "density";
  const z = [], customdata = [];
  for (let r = 0; r < view.rows.length; r++) {
    const line = Array.from(values.subarray(r * wide, (r + 1) * wide));
    const height = view.y[r + 1] - view.y[r];
    z.push(line);
    customdata.push(line.map((value, c) => {
      const width = view.x[c + 1] - view.x[c];
      if (!density) return [100 * value, Math.round(value * width), view.rows[r], view.columns[c]];
      const times = value > -90 ? 10 ** value : 0;
      return [times, (100 * times * height * width) / (n * m), view.rows[r], view.columns[c]];
    }));
  }
  return { ...trace, z, customdata, x: view.x, y: view.y, zmin: view.low, zmax: view.high };
};

const ranges = () => {
  const layout = plot._fullLayout;
  return { x: [...layout.xaxis.range].map(Number), y: [...layout.yaxis.range].map(Number) };
};
const parts = () => {
  const template = settings.templates[isDark() ? "dark" : "light"];
  const data = picture.figure.data.map((trace) => fitted(filled(trace)));
  const layout = { ...picture.figure.layout, template, autosize: true, uirevision: revision };
  if (data.some((trace) => trace.colorbar && trace.colorbar.orientation)) layout.margin = { ...layout.margin, t: 60 };
  // Where a finger scrolls the page, a picture that takes the movement for a zoom is a trap; buttons zoom there.
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
  return { data, layout };
};

const draw = async (keep) => {
  if (!picture || !picture.figure || plot.clientWidth === 0) return;
  let Plotly;
  try { Plotly = await load(); } catch (error) { say(`The figure cannot be drawn: ${error.message}.`); return; }
  const { data, layout } = parts();
  if (keep && zoomed() && plot._fullLayout) {
    const now = ranges();
    layout.xaxis = { ...layout.xaxis, range: now.x };
    layout.yaxis = { ...layout.yaxis, range: now.y };
  }
  const config = {
    responsive: false, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { filename: picture.file, scale: 2 }, doubleClick: "reset",
  };
  const first = !plot._fullLayout;
  await Plotly.react(plot, data, layout, config);
  if (first) {
    plot.on("plotly_click", clicked);
    plot.on("plotly_relayout", moved);
  }
  drawn = `${picture.file} ${isDark()} ${narrow()}`;
  plot.dataset.drawn = picture.file;
};

const clicked = (event) => {
  const point = event.points && event.points[0];
  if (!picture.cells || !point) return;
  if (picture.cells.links) {
    const link = picture.cells.links[point.pointNumber ?? point.index];
    // A node has the outer ends of its streams, a stream has two.
    if (link && point.source && point.target) trigger("cell", { target_layer: link[0], source_layer: link[1] });
    return;
  }
  const place = Array.isArray(point.pointNumber) ? point.pointNumber : point.pointIndex;
  if (Array.isArray(place)) {
    trigger("cell", { target_layer: picture.cells.rows[place[0]], source_layer: picture.cells.columns[place[1]] });
  }
};

const show = async (x, y) => {
  const mine = ++asked;
  const found = await server.zoom({ ...picture.map.ref, x, y });
  if (mine !== asked || !found) return;
  if (found.fault) { say(found.fault); return; }
  say("");
  view = found;
  find(".tm-view").textContent = view.words;
  root.dataset.words = view.words;
  await draw(true);
};
const moved = (event) => {
  if (!zoomed() || !Object.keys(event).some((key) => /^[xy]axis/.test(key))) return;
  clearTimeout(timer);
  timer = setTimeout(() => { const now = ranges(); show(now.x, now.y); }, 120);
};
const zoom = (what) => {
  if (!zoomed() || !plot._fullLayout) return;
  const [n, m] = picture.map.shape, now = ranges(), fixed = picture.map.kind === "share";
  const next = (range, most, step) => {
    let [low, high] = [Math.min(...range), Math.max(...range)];
    const middle = (low + high) / 2, half = (high - low) / 2;
    if (what === "in") [low, high] = [middle - Math.max(half / 2, 2), middle + Math.max(half / 2, 2)];
    if (what === "out") [low, high] = [middle - 2 * half, middle + 2 * half];
    [low, high] = [low + step * half, high + step * half];
    const width = Math.min(high - low, most);
    low = Math.min(Math.max(low, 0), most - width);
    return what === "all" ? [0, most] : [low, low + width];
  };
  const steps = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] }[what] || [0, 0];
  const update = { "xaxis.range": next(now.x, m, steps[0]) };
  if (!fixed) update["yaxis.range"] = next(now.y, n, steps[1]).reverse();
  window.Plotly.relayout(plot, update);
};

const save = (name, url) => {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  document.body.appendChild(link);
  link.click();
  link.remove();
};
const png = async () => {
  const Plotly = await load();
  const { data, layout } = parts();
  const now = zoomed() ? ranges() : null;
  if (now) {
    layout.xaxis = { ...layout.xaxis, range: now.x };
    layout.yaxis = { ...layout.yaxis, range: now.y };
  }
  const words = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  layout.title = {
    text: words(picture.title), subtitle: { text: words(picture.subtitle) }, y: 1, yref: "container", yanchor: "top",
  };
  layout.margin = { ...layout.margin, t: (layout.margin.t || 0) + 72 };
  layout.height += 72;
  // By itself a picture is looked at on paper, whose colour it has to bring.
  layout.paper_bgcolor = isDark() ? "#14171c" : "#ffffff";
  const width = Math.max(plot.clientWidth, 640);
  const options = { format: "png", scale: 2, width, height: layout.height };
  save(`${picture.file}.png`, await Plotly.toImage({ data, layout }, options));
};
const table = async () => {
  const found = await server.data(picture.ref);
  if (!found || found.fault) { say((found && found.fault) || "The data could not be read."); return; }
  const url = URL.createObjectURL(new Blob([found.text], { type: "text/csv" }));
  save(`${found.file}.csv`, url);
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};

const take = () => {
  picture = props.value ? JSON.parse(props.value) : null;
  root.hidden = !picture;
  if (!picture) return;
  asked++;
  view = picture.map ? picture.map.view : null;
  say("");
  find("h3").textContent = picture.title;
  find(".tm-words p").textContent = picture.subtitle || "";
  find("figcaption").textContent = picture.caption || "";
  message.textContent = picture.message || "";
  message.hidden = !picture.message;
  plot.hidden = !picture.figure;
  find(".tm-tools").hidden = !picture.figure;
  find(".tm-tools").style.display = picture.figure ? "" : "none";
  find(".tm-zoom").hidden = !picture.map;
  find(".tm-view").textContent = view ? view.words : "";
  root.dataset.words = view ? view.words : "";
  for (const button of find(".tm-tools").children) {
    // What is read out begins with what is seen, so that it can be said to a computer that listens.
    const what = { png: "PNG: download as a picture", csv: "CSV: download as data" }[button.dataset.do];
    button.setAttribute("aria-label", `${what}, ${picture.title}`);
  }
  if (!picture.figure) { plot.dataset.drawn = ""; return; }
  plot.setAttribute("aria-label", `${picture.title}. ${picture.subtitle || ""}`);
  plot.style.height = `${picture.figure.layout.height}px`;
  plot.classList.toggle("tm-clickable", Boolean(picture.cells));
  // Another picture begins with its whole, not with the stretch that the last one was zoomed to.
  revision++;
  draw(false);
};

root.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !picture || !picture.figure) return;
  if (button.dataset.zoom) zoom(button.dataset.zoom);
  const run = { png, csv: table }[button.dataset.do];
  if (run) run().catch((error) => say(`The download failed: ${error.message}.`));
});
new MutationObserver(() => { if (drawn && !drawn.includes(` ${isDark()} `)) draw(true); })
  .observe(document.body, { attributes: true, attributeFilter: ["class"] });
let width = 0;
new ResizeObserver(() => {
  const now = plot.clientWidth;
  if (!now || now === width) return;
  width = now;
  if (!plot._fullLayout || !drawn.endsWith(` ${narrow()}`)) draw(true);
  else window.Plotly.Plots.resize(plot);
}).observe(plot);
watch("value", take);
take();
