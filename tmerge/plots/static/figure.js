// One figure, of the report page and of the app: a picture is drawn where its place is in sight, as wide as that is and in
// the page's colours (the body's class is "dark" or not), and again as soon as it is in sight with another of these.
window.tmergeFigure = (root, templates, { load = async () => window.Plotly, hears = {} } = {}) => {
  const plot = root.querySelector(".tm-plot");
  let picture = null, revision = 0, drawn = "", barOnTop = false;

  const isDark = () => document.body.classList.contains("dark");
  const stale = () => {
    const now = `${revision} ${plot.clientWidth} ${isDark()}`;
    return picture && picture.figure && plot.clientWidth && now !== drawn ? now : "";
  };
  // A colour bar beside the picture takes a quarter of a phone's width: there it lies on top.
  const narrow = () => plot.clientWidth < 560;
  const fitted = (trace) => {
    if (!narrow() || !trace.colorbar) return trace;
    const place = { x: 0.5, xanchor: "center", y: 1, yref: "container", yanchor: "top" };
    return { ...trace, colorbar: { ...trace.colorbar, orientation: "h", thickness: 10, title: { text: "" }, ...place } };
  };
  const parts = () => {
    const template = templates[isDark() ? "dark" : "light"], data = picture.figure.data.map(fitted);
    // Another picture begins with its whole, not with the stretch that the last one was zoomed to.
    const layout = { ...picture.figure.layout, template, width: plot.clientWidth, uirevision: revision };
    if (data.some((trace) => trace.colorbar && trace.colorbar.orientation)) layout.margin = { ...layout.margin, t: 60 };
    // Where a finger scrolls the page, a picture that takes the movement for a zoom is a trap.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    return { data, layout };
  };
  const draw = async () => {
    if (!stale()) return;
    const Plotly = await load();
    const now = stale();
    if (!Plotly || !now) return;
    drawn = now;
    // plotly.js fails to move a colour bar from one place to the other.
    if (plot._fullLayout && barOnTop !== narrow()) Plotly.purge(plot);
    barOnTop = narrow();
    const { data, layout } = parts(), first = !plot._fullLayout, file = picture.file;
    await Plotly.react(plot, data, layout, {
      // plotly.js shows a button that uploads the picture unless it is told not to.
      showSendToCloud: false, plotlyServerURL: "", displaylogo: false, doubleClick: "reset",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { filename: file, scale: 2 },
    });
    if (first) for (const [event, hear] of Object.entries(hears)) plot.on(event, hear);
    plot.dataset.drawn = file;
  };
  const show = (next) => {
    picture = next;
    revision++;
    root.querySelector("h3").textContent = picture.title;
    root.querySelector("h3 + p").textContent = picture.subtitle || "";
    plot.hidden = !picture.figure;
    plot.dataset.drawn = "";
    if (!picture.figure) return;
    plot.setAttribute("aria-label", `${picture.title}. ${picture.subtitle || ""}`);
    plot.style.height = `${picture.figure.layout.height}px`;
    draw();
  };
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  // It also tells of a place that was out of sight and is not any more.
  new ResizeObserver(draw).observe(plot);
  return { show, parts };
};
