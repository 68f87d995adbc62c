"""The app's looks: one theme, one style sheet, a few lines of script. Nothing is fetched from another host."""

from __future__ import annotations

from typing import Any, Literal

import gradio as gr

from tmerge.templates import static_text

__all__ = ["CSS", "HEAD", "editor", "markup", "theme"]

# The blue of the figures (`tmerge.plots.style`), from pale to deep.
_BLUES = "#f0f7fc #dcecf8 #b9d9f0 #86bde4 #4c9bd3 #1b7dc2 #1567a3 #115284 #0f4268 #0d3452 #082033".split()
_BLUE = gr.themes.Color(*_BLUES)

# On a light page, and on a dark one.
_COLOURS = {
    "body_background_fill": ("#fbfcfd", "#0f1319"),
    "body_text_color": ("#1d2530", "#dbe1ea"),
    "body_text_color_subdued": ("#566273", "#98a5b6"),
    "background_fill_primary": ("#ffffff", "#161b23"),
    "background_fill_secondary": ("#f4f6f9", "#1c222c"),
    "block_background_fill": ("#ffffff", "#161b23"),
    "block_border_color": ("#dde3ea", "#2b3442"),
    "block_label_background_fill": ("transparent", "transparent"),
    "block_label_text_color": ("#3a4656", "#b6c1cf"),
    "block_title_text_color": ("#2b3644", "#ccd5e0"),
    "block_info_text_color": ("#566273", "#98a5b6"),
    "input_background_fill": ("#ffffff", "#10151c"),
    "input_border_color": ("#bfc9d4", "#3a4556"),
    "input_border_color_focus": ("#1b7dc2", "#4c9bd3"),
    "input_placeholder_color": ("#6a7686", "#8491a2"),
    "checkbox_border_color": ("#7b8794", "#7b8797"),
    "button_primary_background_fill": ("#1567a3", "#1567a3"),
    "button_primary_background_fill_hover": ("#115284", "#115284"),
    "button_secondary_background_fill": ("#eef2f6", "#222a36"),
    "button_secondary_background_fill_hover": ("#e2e8ef", "#2c3645"),
    "button_secondary_border_color": ("#cfd8e1", "#3a4556"),
    "button_secondary_text_color": ("#1d2530", "#dbe1ea"),
    "link_text_color": ("#1567a3", "#7db9e4"),
}


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
        block_label_border_width="0px",
        block_label_text_weight="600",
        block_title_text_weight="600",
        block_shadow="none",
        input_border_width="1px",
        button_primary_text_color="#ffffff",
        **{name: light for name, (light, _) in _COLOURS.items()},
        **{f"{name}_dark": dark for name, (_, dark) in _COLOURS.items()},
    )


def markup(value: str, **options: Any) -> gr.HTML:
    """A piece of our own HTML, without Gradio's styles for prose and its script."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def editor(value: str, *, language: Literal["yaml", "markdown"], label: str, lines: int, name: str) -> gr.Code:
    """A text to be edited, copied and downloaded, of so many lines at least; `name` is its element's."""
    return gr.Code(
        value,
        language=language,
        label=label,
        lines=lines,
        max_lines=30,
        interactive=True,
        show_line_numbers=False,
        buttons=["copy", "download"],
        elem_id=name,
    )


CSS = static_text("tmerge.ui", "app.css")

HEAD = f"""<meta name="color-scheme" content="light dark">
<script>{static_text("tmerge.ui", "storage.js")}</script>
<script>{static_text("tmerge.ui", "kept_runs.js")}</script>
<script>{static_text("tmerge.ui", "typed_repos.js")}</script>
<script>{static_text("tmerge.ui", "reached.js")}</script>
<script>{static_text("tmerge.plots", "figure.js")}</script>"""
