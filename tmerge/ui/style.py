"""The app's looks: one theme, one style sheet, a few lines of script. Nothing is fetched from another host."""

from __future__ import annotations

from typing import Any

import gradio as gr

__all__ = ["CSS", "HEAD", "SHOW_RUN_IN_URL", "markup", "theme"]

# The blue of the figures (`tmerge.plots.style`), from pale to deep.
_BLUE = gr.themes.Color(
    c50="#f0f7fc",
    c100="#dcecf8",
    c200="#b9d9f0",
    c300="#86bde4",
    c400="#4c9bd3",
    c500="#1b7dc2",
    c600="#1567a3",
    c700="#115284",
    c800="#0f4268",
    c900="#0d3452",
    c950="#082033",
    name="tmerge-blue",
)


def theme() -> gr.themes.Base:
    """Restrained: one blue, slate greys, thin lines, the bundled IBM Plex."""
    # The bundled semi-bold has half of the alphabet only; the bold one is whole.
    made = gr.themes.Base(
        primary_hue=_BLUE,
        secondary_hue=_BLUE,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=(gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"),
    )
    return made.set(
        body_background_fill="#fbfcfd",
        body_background_fill_dark="#0f1319",
        body_text_color="#1d2530",
        body_text_color_dark="#dbe1ea",
        body_text_color_subdued="#566273",
        body_text_color_subdued_dark="#98a5b6",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#161b23",
        background_fill_secondary="#f4f6f9",
        background_fill_secondary_dark="#1c222c",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161b23",
        block_border_color="#dde3ea",
        block_border_color_dark="#2b3442",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="#3a4656",
        block_label_text_color_dark="#b6c1cf",
        block_label_text_weight="600",
        block_title_text_color="#2b3644",
        block_title_text_color_dark="#ccd5e0",
        block_title_text_weight="600",
        block_info_text_color="#566273",
        block_info_text_color_dark="#98a5b6",
        block_shadow="none",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10151c",
        input_border_width="1px",
        input_border_color="#bfc9d4",
        input_border_color_dark="#3a4556",
        input_border_color_focus="#1b7dc2",
        input_border_color_focus_dark="#4c9bd3",
        input_placeholder_color="#6a7686",
        input_placeholder_color_dark="#8491a2",
        button_primary_background_fill="#1567a3",
        button_primary_background_fill_dark="#1b7dc2",
        button_primary_background_fill_hover="#115284",
        button_primary_background_fill_hover_dark="#1567a3",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#eef2f6",
        button_secondary_background_fill_dark="#222a36",
        button_secondary_background_fill_hover="#e2e8ef",
        button_secondary_background_fill_hover_dark="#2c3645",
        button_secondary_border_color="#cfd8e1",
        button_secondary_border_color_dark="#3a4556",
        button_secondary_text_color="#1d2530",
        button_secondary_text_color_dark="#dbe1ea",
        link_text_color="#1567a3",
        link_text_color_dark="#7db9e4",
    )


def markup(value: str, **options: Any) -> gr.HTML:
    """A piece of our own HTML, without Gradio's styles for prose and its script."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


# Raw: an escape within it is CSS's own.
CSS = r"""
:root { --good: #0b6e4f; --bad: #b3401a; --line: #dde3ea; --card: #ffffff; --quiet: #566273; }
.dark { --good: #4cc39a; --bad: #ff9466; --line: #2b3442; --card: #161b23; --quiet: #98a5b6; }
.gradio-container
  { width: 100% !important; max-width: 1440px !important; margin-inline: auto;
  padding-inline: clamp(8px, 2vw, 32px) !important; }
html, body { overflow-x: clip; }
.section h2 { font-size: 1.15rem; font-weight: 600; margin: 10px 0 0; }
#advanced h3 { font-size: 0.95rem; font-weight: 600; margin: 6px 0 -6px; }
.gradio-container .html-container { padding: 0 !important; }
#texts-found:not(:has(.note)) { display: none; }
#texts-found, #problem { margin-block: -8px; }
.inset { padding: 4px 12px 8px; margin: 0; }
.dark .tab-container button.selected { color: #7db9e4; }
.dark .tab-container button.selected::after { background-color: #7db9e4; }
#expected .pending { opacity: 0.5 !important; }
code.version { font-size: 0.8rem; background: none; padding: 0; border: 0; }
#use-demo { align-self: center; font-weight: 600; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
#masthead h1 { font-size: 1.5rem; margin: 0; letter-spacing: -0.01em; font-weight: 600; }
#masthead p { margin: 2px 0 0; color: var(--quiet); max-width: 70ch; }
#masthead { padding: 10px 0 2px; }
button:focus-visible, a:focus-visible, [tabindex]:focus-visible, summary:focus-visible
  { outline: 2px solid #1b7dc2; outline-offset: 2px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; background: var(--card); min-width: 0; }
.card p { margin: 0 0 6px; overflow-wrap: anywhere; }
.card.quiet { color: var(--quiet); border-style: dashed; }
.card.bad { border-color: var(--bad); border-left-width: 4px; margin-bottom: 10px; }
.card.bad .card-title { color: var(--bad); }
.card-title { font-weight: 600; font-size: 1.02rem; }
.break { overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 12px;
  margin-bottom: 12px; }
.role { text-transform: uppercase; letter-spacing: 0.06em; font-size: 0.75rem; font-weight: 600; color: var(--quiet); }
.role span { text-transform: none; letter-spacing: 0; font-weight: 400; }
.role .mark, .mark { margin-left: 8px; padding: 1px 8px; border: 1px solid currentColor; border-radius: 99px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 8px 16px; margin: 8px 0 0; }
.facts dt, .big dt { font-size: 0.78rem; color: var(--quiet); }
.facts dd, .big dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.big { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 4px 0 8px; }
.big dd { font-size: 1.35rem; font-weight: 600; }
.small { font-size: 0.85rem; color: var(--quiet); }
.notes { margin: 6px 0 0; padding-left: 18px; font-size: 0.88rem; list-style: disc; }
.notes li { overflow-wrap: anywhere; }
.notes .against { color: var(--bad); font-weight: 600; }
table.plain { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; border: 0; }
table.plain th, table.plain td
  { text-align: left; padding: 4px 12px 4px 0; border: 0; border-bottom: 1px solid var(--line); font-size: 0.92rem; }
table.plain td { white-space: nowrap; }
table.plain thead th { font-weight: 400; color: var(--quiet); font-size: 0.8rem; }
table.plain tbody tr:last-child th, table.plain tbody tr:last-child td { border-bottom: 0; }
.scroll { overflow-x: auto; }
.tall { max-height: 300px; overflow-y: auto; }
#push-preview { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: 12px 16px;
  max-height: 640px; overflow: auto; flex-wrap: nowrap; }
#push-preview > * { flex-shrink: 0; max-width: 100%; }
#push-preview details.card { border: 0; padding: 0; }
#push-preview summary { cursor: pointer; color: var(--quiet); font-size: 0.88rem; }
#push-preview pre { font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
#push-markdown table { display: block; overflow-x: auto; border: 0; }
#push-markdown th, #push-markdown td { word-break: normal; overflow-wrap: normal; }
#push-markdown img { max-width: 100%; background: #ffffff; }
.verdict.helps::before { content: "\25B2\00A0"; } .verdict.better::before { content: "\25B3\00A0"; }
.verdict.hurts::before { content: "\25BC\00A0"; }
.note { min-height: 1.4em; margin: 0; font-size: 0.88rem; color: var(--quiet); overflow-wrap: anywhere; }
.note.bad { color: var(--bad); }
.steps { display: grid; gap: 6px; min-height: 258px; align-content: start; }
.step { display: grid; grid-template-columns: 92px 1fr auto; gap: 2px 12px; align-items: center; }
.step .name { font-weight: 600; }
.step .right { font-size: 0.85rem; color: var(--quiet); text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.step.later { opacity: 0.55; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: #1b7dc2; border-radius: 4px; }
.done .bar i { background: var(--good); }
.step .what { grid-column: 2 / 4; font-size: 0.85rem; color: var(--quiet); min-height: 1.3em; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.log { height: 300px; overflow-y: auto; display: flex; flex-direction: column-reverse; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); padding: 8px 12px; }
.log pre { margin: 0; font-size: 0.82rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  background: none; }
#run-map { height: 460px; min-height: 460px; overflow: hidden; }
.run-head { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: baseline; min-height: 74px;
  align-content: start; }
.run-head .state { font-size: 1.2rem; font-weight: 600; }
.run-head .pairname { flex-basis: 100%; color: var(--quiet); overflow-wrap: anywhere; }
.state.done, .verdict.helps { color: var(--good); }
.state.failed, .verdict.hurts { color: var(--bad); }
.verdict { font-size: 1.3rem; font-weight: 600; }
@media (max-width: 640px) {
  .step { grid-template-columns: 76px 1fr auto; }
  .run-head { min-height: 104px; }
  .facts { grid-template-columns: 1fr 1fr; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

HEAD = '<meta name="color-scheme" content="light dark">'

SHOW_RUN_IN_URL = """(id) => {
  const url = new URL(window.location.href);
  if (id) { url.searchParams.set("run", id); } else { url.searchParams.delete("run"); }
  window.history.replaceState(null, "", url);
}"""
"""The run's link, in the address bar: a reload comes back to it."""
