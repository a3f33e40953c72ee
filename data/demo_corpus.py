"""Synthetic demo corpus: stories labeled General, Teen or Mature, generated from templates and a seed.

A story consists of neutral paragraphs and scenes. A scene's content is General, Teen or Mature, and it either happens
or is framed: on a stage, in a dream, a book, the imagination or a film. The label is the most severe scene that
happens. Half of a story's scenes are framed, with random content, whatever its label, so words of severe scenes occur
in every class and classification requires reading the context. The position of the deciding scene is uniform over the
text and is recorded as evidence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

LABELS = ("General", "Teen", "Mature")
SHARES = (0.60, 0.27, 0.13)

NAMES = [
    "Ada",
    "Bruno",
    "Cora",
    "Dario",
    "Elin",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kaya",
    "Lars",
    "Mira",
    "Nils",
    "Odile",
    "Pavel",
    "Rosa",
    "Samir",
    "Tilda",
    "Ugo",
    "Vera",
    "Wanda",
    "Yusuf",
    "Zora",
    "Anton",
    "Beatrix",
    "Casper",
    "Dora",
    "Emil",
    "Fenna",
]
PLACES = [
    "harbour",
    "mill",
    "market hall",
    "ferry landing",
    "brickyard",
    "old observatory",
    "bakery",
    "signal box",
    "boathouse",
    "orchard",
    "printing shop",
    "tram depot",
    "quarry",
    "glasshouse",
    "school yard",
    "town archive",
]
TIMES = [
    "Early on Monday",
    "Towards noon",
    "After supper",
    "Late in the week",
    "On the first warm day",
    "Before the rain",
    "At dusk",
    "On the eve of the fair",
    "When the bells had rung",
    "In the quiet hour after lunch",
]
THINGS = [
    "a crate of pears",
    "two coils of rope",
    "the ledger",
    "a jar of honey",
    "the spare lantern",
    "a bundle of letters",
    "a box of nails",
    "the blue kettle",
    "a sack of flour",
    "an atlas",
    "a pair of oars",
    "the clock's pendulum",
]

QUIET = [
    "{time} {a} carried {thing} to the {place} and found the door already open.",
    "{a} and {b} talked about the price of timber until the kettle boiled.",
    "The {place} smelled of tar and oranges, and nobody was in a hurry.",
    "{b} had promised to mend the gate, and {time_l} the gate was mended.",
    "There was a letter for {a} from an aunt who wrote mostly about her hens.",
    "{a} counted the steps up to the {place}, as always, and as always lost count.",
    "Rain came in from the west and left again before {b} had shut the windows.",
    "{a} asked after {b}'s grandmother, who was better and wanted her spectacles.",
    "They agreed that the {place} needed paint, and that it would not get any this year.",
    "{time} {b} walked the long way round, past the {place}, to look at the ducks.",
    "{a} wrote the day's numbers in a column and underlined the last one twice.",
    "A dog slept across the threshold of the {place}, and everyone stepped over it.",
    "{b} lent {a} {thing}, on the understanding that it came back by Friday.",
    "Somebody had left {thing} on the bench, and by evening somebody had fetched it.",
    "{a} liked the {place} best when the lamps were lit and the talk was low.",
    "{b} taught {a} the knot that does not slip, and {a} tied it wrong four times.",
    "For a while they said nothing, and it was a comfortable kind of nothing.",
    "{time} the post was late, and {a} made soup out of what there was.",
    "{a} drew a plan of the {place} on the back of an envelope and then drew it again, larger.",
    "{b} laughed at the story about the goose, although {a} had told it badly.",
    "The train was full of students, and {a} stood all the way with {thing} on one arm.",
    "{a} found the missing key in the pocket of the other coat.",
    "At the {place} they were short of chairs, so {b} sat on {thing}.",
    "{b} kept bees behind the {place} and could tell you the weather from their temper.",
]

# Content of a scene, by severity.
CONTENT: dict[str, list[str]] = {
    "General": [
        "{x} won the relay by a hand's breadth, and {y} was carried round the field on the others' shoulders.",
        "{x} asked {y} to the summer dance, and {y} said yes before the question was done.",
        "{x} pulled {y} out of the snowdrift, and both of them laughed until their ribs hurt.",
        "{x} sang the old song without a mistake, and {y} cried a little from pure pride.",
        "{x} let the kite go higher than the tower while {y} ran below it shouting.",
        "{x} gave {y} the prize marrow, the biggest anyone had seen, and they weighed it twice.",
        "{x} brought the lost lamb home in a coat, and {y} warmed milk for it on the stove.",
        "{x} finished the quilt at last, and {y} found the square that was cut from a wedding dress.",
    ],
    "Teen": [
        "{x} swung at {y} and split a lip; they rolled in the dust, cursing, until both were bruised and out of breath.",
        "{x} drained the bottle in front of {y}, swore at the whole room and was sick behind the shed.",
        "{x} shoved {y} against the lockers, called {y} a damned liar and threw a punch that broke a tooth.",
        "{x} and {y} were drunk by ten, kissed on the stairs and fought with two strangers over a hat.",
        "{x} lit one cigarette after another while {y}, tipsy, screamed insults at the neighbours.",
        "{x} hit {y} over the head with a chair leg; there was a bump, a black eye and a great deal of swearing.",
        "{x} stole a car for a dare, and {y} hung out of its window, drunk and yelling filthy rhymes.",
        "{x} slapped {y} hard, twice, and {y} spat and threatened to smash every window in the house.",
    ],
    "Mature": [
        "{x} drove the knife into {y}'s chest and held it there until the breathing stopped and blood covered the floor.",
        "{x} shot {y} twice, in the chest and in the head, and the wall behind was red with blood.",
        "{x} cut {y}'s throat from behind; there was blood to the ceiling, and the corpse slid down the door.",
        "{x} tortured {y} with a hot iron for an hour, until the screams turned into nothing.",
        "{x} injected heroin into a ruined vein; {y} found the body on the mattress, cold and blue.",
        "{x} beat {y} to death with a hammer and hid the mutilated corpse in the cellar.",
        "{x} strangled {y} slowly with a wire and dumped the naked corpse in the well.",
        "{x} poured petrol over {y}, who was bound, struck a match and watched the victim burn alive.",
    ],
}

# Opening and closing of a scene that happens.
REAL: list[tuple[str, str]] = [
    ("{time} it came to a head at the {place}.", "Everyone at the {place} knew of it by nightfall."),
    ("Nobody had expected it, that hour at the {place}.", "The {place} was never quite the same after that."),
    ("What {a} saw through the window was plain enough.", "{a} told the constable every detail the same day."),
    ("The lane behind the {place} was empty but for the two of them.", "By morning it was in the newspaper."),
    ("It had been coming for weeks, and {time_l} it came.", "{a} had stood near enough to touch them."),
    ("{a} came round the corner at that very moment.", "It took {a} a long time to walk home."),
    ("The others had gone ahead to the {place}.", "When the others came back, it was over."),
    ("There was one witness, {a}, and it was no secret for long.", "People still point out the spot."),
]
# Opening and closing of a framed scene.
FRAMED: list[tuple[str, str]] = [
    (
        "On the stage of the parish hall the players gave the last act.",
        "The curtain fell, and the actors bowed, all in one piece.",
    ),
    ("That night {a} had a dream.", "{a} woke up: nothing of the kind had happened."),
    ("{a} read aloud from a novel with a torn cover.", "{a} shut the novel and put it back on the shelf."),
    (
        "On the screen of the little cinema the film reached its end.",
        "The lights went up, and it had only been a film.",
    ),
    ("{a} lay awake imagining what might have been.", "But it stayed in {a}'s imagination and never came to pass."),
    (
        "The children were playing at make-believe behind the {place}.",
        "Then it was tea-time, and the game was forgotten.",
    ),
    (
        "{a} was rehearsing a scene for the theatre club.",
        "The prompter closed the script, and they rehearsed it again.",
    ),
    ("There was a rumour, and {a} repeated it.", "Not a word of the rumour was true, as {a} admitted later."),
]


@dataclass
class Scene:
    """A scene of a story: its content, and whether it is framed (does not happen)."""

    content: str
    framed: bool


def plan_scenes(label: str, num_chunks: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of a story; the number of scenes and of framed ones does not depend on the label."""
    if num_chunks <= 2:
        # One decisive scene, which happens or is framed, and in two chunks also a General one.
        content = label if label != "General" else str(rng.choice(LABELS, p=[0.3, 0.4, 0.3]))
        scenes = [Scene(content, framed=label == "General"), Scene("General", framed=label != "General")]
        return scenes[:num_chunks]
    num_scenes = 4 + 2 * (num_chunks > 9)
    happens = [label]
    if label == "Mature" and rng.random() < 0.5:
        happens.append("Teen")
    happens += ["General"] * (num_scenes // 2 - len(happens))
    framed = [str(content) for content in rng.choice(LABELS, num_scenes // 2, p=[0.3, 0.3, 0.4])]
    return [Scene(content, framed=False) for content in happens] + [Scene(content, framed=True) for content in framed]


def write_story(
    label: str, num_chunks: int, words_in_chunk: int, rng: np.random.Generator
) -> tuple[str, list[dict[str, Any]]]:
    """Generate a story of about `num_chunks` chunks, and its evidence.

    Evidence is the character span `[start, end)` of the scene that decides the label; empty for General.
    """
    names = [str(name) for name in rng.permutation(NAMES)[:6]]

    def fill(template: str, x: int = 2, y: int = 3) -> str:
        a, b = rng.permutation(names[:2])
        time = str(rng.choice(TIMES))
        return template.format(
            a=a,
            b=b,
            x=names[x],
            y=names[y],
            time=time,
            time_l=time[0].lower() + time[1:],
            place=rng.choice(PLACES),
            thing=rng.choice(THINGS),
        )

    paragraphs: list[tuple[str, Scene | None]] = []
    scenes = plan_scenes(label, num_chunks, rng)
    for scene in scenes:
        opening, closing = (FRAMED if scene.framed else REAL)[rng.integers(8)]
        x, y = rng.permutation([2, 3, 4, 5])[:2]
        content = str(rng.choice(CONTENT[scene.content]))
        paragraphs.append((" ".join(fill(part, x, y) for part in (opening, content, closing)), scene))
    num_words = sum(len(text.split()) for text, _ in paragraphs)
    quiet: list[tuple[str, Scene | None]] = []
    while num_words < (num_chunks - 0.4) * words_in_chunk:
        length = int(rng.integers(3, 6))
        text = " ".join(fill(str(template)) for template in rng.choice(QUIET, length, replace=False))
        quiet.append((text, None))
        num_words += len(text.split())
    order = rng.permutation(len(paragraphs) + len(quiet))
    shuffled = [(paragraphs + quiet)[i] for i in order]
    text, evidence = "", []
    for paragraph, scene in shuffled:
        start = len(text)
        text += paragraph
        if label != "General" and scene is not None and scene.content == label and not scene.framed:
            evidence.append({"start": start, "end": len(text)})
        text += "\n\n"
    return text.rstrip("\n"), evidence


def demo_corpus(num_documents: int = 800, seed: int = 7, words_in_chunk: int = 47) -> list[dict[str, Any]]:
    """Generate the corpus: `{"id", "text", "label", "evidence": [{"start", "end"}]}`, with character offsets.

    Args:
        words_in_chunk: words per chunk; 47 correspond to 64 tokens of MiniLM.
    """
    rng = np.random.default_rng(seed)
    documents = []
    labels = rng.permutation(np.repeat(LABELS, np.round(np.array(SHARES) * num_documents).astype(int)))
    for number, label in enumerate(labels):
        num_chunks = int(np.clip(round(rng.lognormal(2.0, 0.55)), 1, 25))
        text, evidence = write_story(str(label), num_chunks, words_in_chunk, rng)
        documents.append({"id": f"story-{number:04d}", "text": text, "label": str(label), "evidence": evidence})
    return documents
