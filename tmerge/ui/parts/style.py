"""The app's looks: one theme, one style sheet, a few lines of script. Nothing is fetched from another host."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tmerge.templates import static_text

__all__ = ["CSS", "HEAD", "markup", "theme"]

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
        checkbox_border_color="#7b8794",
        checkbox_border_color_dark="#7b8797",
        button_primary_background_fill="#1567a3",
        button_primary_background_fill_dark="#1567a3",
        button_primary_background_fill_hover="#115284",
        button_primary_background_fill_hover_dark="#115284",
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


CSS = static_text("tmerge.ui", "app.css")

HEAD = f"""<meta name="color-scheme" content="light dark">
<script>{static_text("tmerge.ui", "storage.js")}</script>
<script>{static_text("tmerge.ui", "kept_runs.js")}</script>
<script>{static_text("tmerge.ui", "reached.js")}</script>
<script>{static_text("tmerge.plots", "figure.js")}</script>"""
