"""Prompts to begin with, in the languages of the calibration sets that ship with the package."""

from __future__ import annotations

from tmerge.calibration import SAMPLES_PREFIX

__all__ = ["offered_prompts"]

_PROMPTS = {
    "english": (
        "Why is the sky blue?",
        "Write two sentences about a market in the morning.",
        "The capital of France is",
        "A good breakfast needs",
    ),
    "indonesian": (
        "Mengapa langit berwarna biru?",
        "Tulis dua kalimat tentang pasar di pagi hari.",
        "Ibu kota Indonesia adalah",
        "Untuk membuat nasi goreng, pertama-tama",
    ),
    "malay": (
        "Mengapakah langit berwarna biru?",
        "Tulis dua ayat tentang pasar pada waktu pagi.",
        "Ibu negara Malaysia ialah",
        "Untuk memasak nasi lemak, mula-mula",
    ),
    "thai": (
        "ทำไมท้องฟ้าจึงเป็นสีฟ้า",
        "เขียนสองประโยคเกี่ยวกับตลาดตอนเช้า",
        "เมืองหลวงของประเทศไทยคือ",
        "วิธีทำข้าวผัด เริ่มจาก",
    ),
    "cantonese": (
        "點解個天係藍色嘅？",
        "寫兩句嘢講下朝早嘅街市。",
        "香港最高嘅山係",
        "炒飯要好食，首先要",
    ),
}


def offered_prompts(dataset: str) -> tuple[str, ...]:
    """Four prompts in the language of a calibration set: two requests and two beginnings; English where it is unknown.

    Args:
        dataset: The recipe's ``calibration.dataset``.
    """
    language = dataset.removeprefix(SAMPLES_PREFIX) if dataset.startswith(SAMPLES_PREFIX) else "english"
    return _PROMPTS.get(language, _PROMPTS["english"])
