"""Sentences that mean the same in four languages, and their speech: data to learn transcription and translation on.

    the red dog sleeps today - der rote hund schläft heute - el perro rojo duerme hoy - le chien rouge dort aujourd'hui

Word order, gender and agreement differ, so that translating is more than putting one word for another. All texts are in
lower case, and without punctuation but for French apostrophes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Any, Literal

from . import encoding, speech
from .espeak import Espeak
from .samples import Made

LANGUAGES = ("English", "German", "Spanish", "French")
DIRECTIONS = (("German", "English"), ("Spanish", "English"), ("English", "German"), ("French", "Spanish"))
"""From and to: what is learned of the translations, in writing and from speech."""

_VOICES = {"English": "en-us", "German": "de", "Spanish": "es", "French": "fr"}
_TRAINING_VARIANTS = ("m1", "m2", "m4", "m5", "m6", "f1", "f2", "f3", "f5")
_HELD_OUT_VARIANT = "m3"
"""Chosen before any model was trained; the one of `speech.HELD_OUT_VOICE`."""

# English; German with gender; Spanish with gender; French with gender.
_NOUNS = (
    ("dog", ("hund", "m"), ("perro", "m"), ("chien", "m")),
    ("cat", ("katze", "f"), ("gata", "f"), ("chatte", "f")),
    ("horse", ("pferd", "n"), ("caballo", "m"), ("cheval", "m")),
    ("cow", ("kuh", "f"), ("vaca", "f"), ("vache", "f")),
    ("boy", ("junge", "m"), ("niño", "m"), ("garçon", "m")),
    ("woman", ("frau", "f"), ("mujer", "f"), ("femme", "f")),
    ("duck", ("ente", "f"), ("pato", "m"), ("canard", "m")),
    ("mouse", ("maus", "f"), ("ratón", "m"), ("souris", "f")),
)
# English; German after an article; Spanish and French, masculine and feminine.
_ADJECTIVES = (
    ("red", "rote", ("rojo", "roja"), ("rouge", "rouge")),
    ("black", "schwarze", ("negro", "negra"), ("noir", "noire")),
    ("white", "weiße", ("blanco", "blanca"), ("blanc", "blanche")),
    ("green", "grüne", ("verde", "verde"), ("vert", "verte")),
    ("tired", "müde", ("cansado", "cansada"), ("fatigué", "fatiguée")),
    ("strong", "starke", ("fuerte", "fuerte"), ("fort", "forte")),
)
_VERBS = (
    ("sleeps", "schläft", "duerme", "dort"),
    ("eats", "isst", "come", "mange"),
    ("sings", "singt", "canta", "chante"),
    ("runs", "läuft", "corre", "court"),
    ("drinks", "trinkt", "bebe", "boit"),
    ("waits", "wartet", "espera", "attend"),
)
_TIMES = (
    ("today", "heute", "hoy", "aujourd'hui"),
    ("now", "jetzt", "ahora", "maintenant"),
    ("always", "immer", "siempre", "toujours"),
    ("often", "oft", "a menudo", "souvent"),
    ("here", "hier", "aquí", "ici"),
    ("again", "wieder", "otra vez", "encore"),
)
_GERMAN, _SPANISH, _FRENCH = {"m": "der", "f": "die", "n": "das"}, {"m": "el", "f": "la"}, {"m": "le", "f": "la"}


@dataclass(frozen=True)
class Sentence:
    """One of the 1,728 sentences, by the numbers of its noun, adjective, verb and time."""

    noun: int
    adjective: int
    verb: int
    time: int

    @property
    def held_out(self) -> bool:
        """Whether it is one of the tenth that no training text says, in no language."""
        key = f"{self.noun} {self.adjective} {self.verb} {self.time}".encode()
        return sha256(key).digest()[0] < 26

    def text(self, language: str) -> str:
        """The sentence in one of `LANGUAGES`."""
        index = LANGUAGES.index(language)
        noun, adjective = _NOUNS[self.noun], _ADJECTIVES[self.adjective]
        verb, time = _VERBS[self.verb][index], _TIMES[self.time][index]
        if language == "English":
            return f"the {adjective[0]} {noun[0]} {verb} {time}"
        if language == "German":
            name, gender = noun[1]
            return f"{_GERMAN[gender]} {adjective[1]} {name} {verb} {time}"
        (name, gender), articles = (noun[2], _SPANISH) if language == "Spanish" else (noun[3], _FRENCH)
        return f"{articles[gender]} {name} {adjective[index][gender == 'f']} {verb} {time}"


def draw(rng: Random, held_out: bool) -> Sentence:
    """A sentence of the training set, or one held out."""
    while True:
        sentence = Sentence(*(rng.randrange(len(words)) for words in (_NOUNS, _ADJECTIVES, _VERBS, _TIMES)))
        if sentence.held_out == held_out:
            return sentence


def written(sets: Sequence[str], seed: int, start: int, stop: int) -> list[Made]:
    """Dialogs without sound: sentences to be repeated, and to be translated in `DIRECTIONS`. After a sentence stand as
    many blanks as silence would leave."""
    made: list[Made] = []
    for index in range(start, stop):
        rng = Random(f"{seed}/written/{index}")
        sentence, (prompt, source, target) = draw(rng, held_out=False), _task(rng)
        text = sentence.text(source) + " ." * rng.choice((0, 0, *range(1, 14)))
        messages = [
            {"role": "system", "content": prompt},
            {"role": "user", "content": text},
            {"role": "assistant", "content": sentence.text(target)},
        ]
        made.append(
            (sets[0], f"{index:06d}", {"json": {"messages": messages}, "txt": f"{text}\n{sentence.text(target)}"})
        )
    return made


def spoken(sets: Sequence[str], seed: int, start: int, stop: int, *, split: Literal["train", "new"]) -> list[Made]:
    """The same with speech in place of the sentence. In the test set sentences and voices are held out, and each
    recording goes with its transcript. `translation` has the sentence in all languages."""
    made: list[Made] = []
    with Espeak() as espeak:
        for index in range(start, stop):
            rng = Random(f"{seed}/spoken/{split}/{index}")
            sentence, (prompt, source, target) = draw(rng, split == "new"), _task(rng)
            if split == "new":
                source = target = LANGUAGES[index % len(LANGUAGES)]
                prompt = transcription_prompt(source)
            variants = _TRAINING_VARIANTS if split == "train" else (_HELD_OUT_VARIANT,)
            voices = [speech.Voice(name=f"{_VOICES[source]}+{variant}") for variant in variants]
            samples, voice = speech.speak(espeak, sentence.text(source), voices, rng)
            messages: list[dict[str, Any]] = [
                {"role": "system", "content": prompt},
                {"role": "user", "content": [{"type": "audio", "audio": "flac"}]},
                {"role": "assistant", "content": sentence.text(target)},
            ]
            translation = {other: sentence.text(other) for other in LANGUAGES}
            content = {"messages": messages, "language": source, "voice": voice, "translation": translation}
            flac = encoding.flac(samples, speech.SAMPLE_RATE)
            made.append((sets[0], f"{index:06d}", {"flac": flac, "txt": sentence.text(source), "json": content}))
    return made


def transcription_prompt(language: str) -> str:
    """The paper's (section 8.2.1), as `herdkit.speech.prompts` has it, which data must not know."""
    return f"Repeat after me in {language}:"


def translation_prompt(language: str) -> str:
    """Likewise."""
    return f"Translate the following sentence into {language}:"


def _task(rng: Random) -> tuple[str, str, str]:
    """A prompt, and the languages of what is given and what is wanted."""
    if rng.random() < 0.5:
        language = rng.choice(LANGUAGES)
        return transcription_prompt(language), language, language
    source, target = rng.choice(DIRECTIONS)
    return translation_prompt(target), source, target
