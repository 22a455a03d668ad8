"""The words that fill the prompts: common English words, each list in alphabetical order.

Longer lists than any tokenizer needs: a prompt takes only words that its tokenizer writes as one token. Objects and
colours begin with a consonant, so that `a` is right before each of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Forms(NamedTuple):
    """A word for one and for several: a noun, or a verb's third person."""

    one: str
    several: str


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


def _noun(word: str) -> Forms:
    return Forms(word, word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s"))


def _verb(word: str) -> Forms:
    return Forms(word + "s", word)


NAMES = _list(
    """Aaron Adam Alan Alice Amy Andrew Anna Anne Anthony Arthur Ben Brian Carl Carol Charles Chris Daniel David
    Diana Edward Elizabeth Emily Emma Eric Frank Fred George Grace Hannah Harry Helen Henry Jack Jacob James Jane
    Jason Jim Joe John Jose Joseph Joshua Julia Karen Kate Kevin Laura Lewis Linda Lisa Louis Lucy Luke Marie Mark
    Martin Mary Matthew Michael Nick Oliver Oscar Patrick Paul Peter Philip Rachel Richard Robert Rose Ruth Ryan
    Sam Samuel Sarah Scott Simon Stephen Steven Susan Thomas Tim Tom Victor Victoria Walter William"""
)
PLACES = _list(
    """airport bank beach church garden hospital house library market museum office park restaurant river school
    station store theater village"""
)
GIFTS = _list(
    """basketball book bottle box camera card coat drink flower hat kiss letter magazine map necklace newspaper
    picture present ring rose sandwich shirt ticket toy watch"""
)
EVENTS = _list(
    """affair agreement alliance attack battle boycott campaign case ceremony change conflict contract crisis cycle
    deal debate decline development drought effort election exhibition expansion experiment fall festival fight
    flood growth hunt investigation journey march marriage mission negotiation occupation operation order peace
    plan practice process program progress project quest rally reform reign retreat revolt revolution rise rule
    search series siege storm strike struggle study tour trade trial trip truce voyage war work"""
)
ARGUMENTS = _list(
    """action address args array base body buffer callback code color command config content context copy count data
    date default depth end error event field file files flag format function group handler head header host index
    info input item items key label length level limit line list message method mode model module name names node
    number object offset option options order output owner page parent parser path pattern point port position
    prefix process query range record request response result results root row rows scale score script section
    server size source start state status step string table tag target test text time timeout title token tree
    type unit update user value values vector version width window word"""
)
DESCRIPTIONS = _list(
    """account area bridge case chance city class control corner course day doctor door effect engine family field
    film fire floor force future game glass gold ground hand heart history hour idea island king lake land law
    light list love machine man map market mind moment money month moon morning music night ocean paper party
    peace person place plan plant power price question reason rest river road room school sea season sector shape
    ship side sky song space star stone story summer sun system team theory thing town train travel view voice
    wall war water way wind window winter wood world year"""
)
COLORS = _list(
    """beige black blue bronze brown buff chestnut copper coral cream crimson cyan gold gray green khaki lavender
    lemon lilac lime magenta maroon mauve navy peach pink plum purple red rose ruby rust scarlet silver tan teal
    turquoise violet white yellow"""
)
OBJECTS = _list(
    """bag ball basket bell book bottle bowl box bracelet brush button candle cap card chain clock coat coin cup desk
    disk door doll fan flag fork glass glove hat hammer jar key knife lamp leaf lighter lock magnet map mirror mug
    necklace notebook paper pen pencil phone plate pot puzzle ring rope shell shirt shoe spoon stone table ticket
    towel toy watch wheel"""
)
NOUNS = tuple(
    _noun(word)
    for word in _list(
        """actor album animal apple argument article artist attribute aunt author band bank bear bird block boat book
        bottle box boy bridge brother building button camera camp candidate captain car card castle cat cell
        chair chapter character chief church citizen class client clock cloud club coach college column command
        computer cousin cow critic customer dancer daughter dealer designer desk device director doctor dog
        door driver editor egg element employee engine engineer error event exception expert fan farm farmer
        father field fighter file film flower forest fox friend function game garden gate ghost giant girl goal
        group guard guest guide gun hall hat header horse hospital hotel house hunter instance island item
        journal judge key kid king lake lamp language lawyer leader lesson letter line lion list machine
        magazine manager market member message method minister mirror model module monster mother mountain
        movie museum name neighbor number nurse object office officer option owner page painter parameter park
        partner path patient phone picture pilot plane planet plant plate player poem poet prince prisoner
        product program project queen reader record report restaurant river road robot rock room sailor scholar
        school scientist senator servant server ship shoe shop singer sister snake soldier son song speaker
        star station stone storm stranger street string student subclass system table task teacher temple test
        theater thread ticket tiger tool tower town tree truck type user value variable vehicle village visitor
        wall warrior weapon wheel window winner word worker writer"""
    )
)
VERBS = (
    Forms("is", "are"),
    Forms("was", "were"),
    Forms("has", "have"),
    Forms("does", "do"),
    *map(
        _verb,
        _list(
            """appear become begin call come contain fall follow give grow help know lead like look make mean move
        need play provide read remain return run seem show smile start stop take use wait walk want work write"""
        ),
    ),
)
"""The forms of the third person, one and several."""
