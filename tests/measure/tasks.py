"""Tasks for a real model: what is asked, the tools or the schema, and what must come of it. See real_model.py.

`OPEN` are the tasks with which the words that the plugin sends to the model are chosen. `OWN` are others of the same
kinds, to see whether words that fit the first also fit what they were not chosen for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import llm
from pydantic import BaseModel

# The tools


def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    "Get the current weather of a city"
    return f"{city}: {'63 degrees fahrenheit' if unit == 'fahrenheit' else '17 degrees celsius'}, light rain"


def get_time(timezone: str) -> str:
    "Get the current time in an IANA time zone such as Europe/Paris"
    return {"Asia/Tokyo": "19:30", "America/New_York": "05:30"}.get(timezone, "10:30")


def add(a: float, b: float) -> float:
    "Add two numbers"
    return float(a) + float(b)


def multiply(a: float, b: float) -> float:
    "Multiply two numbers"
    return float(a) * float(b)


RATES = {"USD": 1.0, "EUR": 0.92, "GBP": 0.8, "JPY": 150.0}


def convert_currency(amount: float, from_currency: str, to_currency: str) -> str:
    "Convert an amount of money. Currencies are ISO codes such as USD"
    return f"{float(amount) / RATES[from_currency] * RATES[to_currency]:.2f} {to_currency}"


def search_books(query: str, max_results: int = 5) -> list:  # type: ignore[type-arg]
    "Search the library's catalogue"
    found = {"book_id": 88, "title": "Dune" if "une" in query else f"SPQR: {query}"}
    return [found, {"book_id": 91, "title": "Another book"}][: int(max_results)]


def get_book(book_id: int) -> dict:  # type: ignore[type-arg]
    "Get the details of a book by its id"
    return {"book_id": int(book_id), "author": "Frank Herbert", "pages": 412, "year": 1965}


def send_email(to: list[str], subject: str, body: str, cc: list[str] | None = None) -> str:
    "Send an e-mail"
    return f"sent to {', '.join(to)}"


def create_event(
    title: str, date: str, start_time: str, duration_minutes: int = 60, attendees: list[str] | None = None
) -> str:
    "Put an event into the calendar. date: YYYY-MM-DD, start_time: HH:MM"
    return f"event 551 created: {title}"


FILES = {"config/settings.toml": "[server]\nport = 8080\n", "src/main.py": "print('hello from main')\n"}


def read_file(path: str) -> str:
    "Read a text file"
    if path.removeprefix("./") not in FILES:
        raise FileNotFoundError(f"No such file: {path}")
    return FILES[path.removeprefix("./")]


def list_files(directory: str = ".") -> list:  # type: ignore[type-arg]
    "List the files of a directory"
    return ["main.py"] if "src" in directory else ["README.md", "setup.cfg", "src"]


def write_file(path: str, content: str) -> str:
    "Write text to a file"
    return f"wrote {len(content)} characters to {path}"


def run_sql(query: str) -> list:  # type: ignore[type-arg]
    "Run a SQL query against the shop's SQLite database"
    return [{"count(*)": 42}]


def translate(text: str, target_language: str) -> str:
    "Translate a text into another language"
    return "おはようございます"


def set_light(room: str, state: Literal["on", "off"], brightness: int | None = None) -> str:
    "Switch the light of a room. brightness: percent"
    return "ok"


def set_thermostat(room: str, temperature: float) -> str:
    "Set the thermostat of a room, in degrees celsius"
    return "ok"


def get_stock_price(symbol: str) -> float:
    "The latest price of a share, by its ticker symbol"
    return 231.5


def find_user(name: str) -> dict:  # type: ignore[type-arg]
    "Find the id of a user by full name"
    return {"user_id": 31}


def get_user(user_id: int) -> dict:  # type: ignore[type-arg]
    "Get the profile of a user by id"
    return {"user_id": int(user_id), "name": "Alice Smith", "email": "alice.smith@example.org", "plan": "gold"}


def todo_add(
    task: str,
    priority: Literal["low", "medium", "high"] = "medium",
    tags: list[str] = [],  # noqa: B006 - the default is part of what the model is shown
) -> str:
    "Add a task to the to-do list"
    return "added"


def todo_list() -> list:  # type: ignore[type-arg]
    "All tasks of the to-do list"
    return ["water the plants", "file taxes"]


def python_exec(code: str) -> str:
    "Run Python code and return what it prints"
    return "1\n4\n9\n16\n25\n"


HOME = (set_light, set_thermostat, get_weather, todo_add, todo_list)
MATHS = (add, multiply)
MIX = (get_weather, convert_currency, search_books, send_email, create_event)
DEV = (read_file, list_files, write_file, python_exec, run_sql)


# What must come of a task


class Optional:
    """An argument that may be left out or be None, or else must be one of ``values``."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def pattern(regex: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.search(regex, value, re.I | re.S) is not None


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda given: any(same(given, value) for value in values)


def same(given: Any, wanted: Any) -> bool:
    """Whether a value is what it should be: equal but for upper and lower case and outer spaces, or by a function."""
    if callable(wanted):
        return bool(wanted(given))
    if isinstance(wanted, bool) or isinstance(given, bool):
        return given is wanted
    if isinstance(given, str) and isinstance(wanted, str):
        return given.strip().casefold() == wanted.strip().casefold()
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(same, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same(given[key], wanted[key]) for key in wanted)
    return bool(given == wanted)


def arguments_match(given: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a call has the arguments that it should have, and no others."""
    for name, value in wanted.items():
        if isinstance(value, Optional):
            if given.get(name) is not None and not any(same(given[name], allowed) for allowed in value.values):
                return False
        elif name not in given or not same(given[name], value):
            return False
    return given.keys() <= wanted.keys()


Call = tuple[str, dict[str, Any]]
Tool = Callable[..., Any]
Kind = Literal["tool", "no tool", "schema", "both"]


@dataclass(frozen=True)
class Turn:
    """A prompt, the calls that must be made for it, in any order, and a regular expression of the final answer."""

    prompt: str
    calls: tuple[Call, ...] = ()
    final: str = r"\S"


@dataclass(frozen=True)
class Task:
    """One or more turns of a conversation, with tools or a schema or both; ``check`` is given the JSON value."""

    id: str
    kind: Kind
    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    schema: dict[str, Any] | None = None
    check: Callable[[Any], bool] = bool


def tool_task(id: str, tools: tuple[Tool, ...], prompt: str, *calls: Call, final: str = r"\S") -> Task:
    return Task(id, "tool" if calls else "no tool", (Turn(prompt, calls, final),), tools)


def schema_task(id: str, schema: dict[str, Any], prompt: str, check: Callable[[Any], bool]) -> Task:
    return Task(id, "schema", (Turn(prompt),), schema=schema, check=check)


def both_task(
    id: str, tools: tuple[Tool, ...], schema: dict[str, Any], turn: Turn, check: Callable[[Any], bool]
) -> Task:
    return Task(id, "both", (turn,), tools, schema, check)


def call(tool: str, /, **arguments: Any) -> Call:
    return (tool, arguments)


def low(value: Any) -> str:
    return str(value).casefold()


def object_of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def array_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def several(dsl: str) -> dict[str, Any]:
    return llm.schema_dsl(dsl, multi=True)


STRING, INTEGER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "boolean"))
CELSIUS = Optional("celsius")


class Member(BaseModel):
    name: str
    role: str


class Team(BaseModel):
    name: str
    members: list[Member]


def convert(amount: float, source: str, target: str) -> Call:
    return call("convert_currency", amount=amount, from_currency=source, to_currency=target)


def weather(city: str) -> Call:
    return call("get_weather", city=pattern(city), unit=CELSIUS)


def to_do(task: str) -> Call:
    any_tags = Optional(lambda value: isinstance(value, list))
    return call("todo_add", task=pattern(task), priority=Optional("low", "medium", "high"), tags=any_tags)


# The open tasks

PEOPLE = (
    "At the meeting were Maria Lopez, 42, an engineer from Madrid; Ken Tanaka, a 35 year old designer from Osaka; "
    "and Ann Lee, who is 29 and works as a nurse in Dublin."
)

OPEN = (
    tool_task(
        "T01",
        (get_weather,),
        "What's the weather like in Berlin right now?",
        call("get_weather", city="Berlin", unit=CELSIUS),
        final=r"17|rain",
    ),
    tool_task("T03", MIX, "How much is 250 US dollars in euros?", convert(250, "USD", "EUR"), final=r"230"),
    tool_task(
        "T07",
        MIX,
        "Find me three books about Roman history",
        call("search_books", query=pattern("roman"), max_results=3),
        final=r"SPQR|Another",
    ),
    tool_task(
        "T08",
        MIX,
        "Email anna@example.com and bob@example.com with the subject 'Lunch', saying 'See you at noon'.",
        call(
            "send_email",
            to=["anna@example.com", "bob@example.com"],
            subject="Lunch",
            body=pattern("see you at noon"),
            cc=Optional([]),
        ),
        final=r"sent|email",
    ),
    tool_task(
        "T09",
        MIX,
        "Put a 30 minute meeting 'Design review' into my calendar on 2026-12-03 at 14:00.",
        call(
            "create_event",
            title=pattern("design review"),
            date="2026-12-03",
            start_time="14:00",
            duration_minutes=30,
            attendees=Optional([]),
        ),
        final=r"design review|created|calendar|scheduled",
    ),
    tool_task(
        "T14",
        HOME,
        "Turn off the light in the kitchen",
        call("set_light", room="kitchen", state="off", brightness=Optional(0)),
    ),
    tool_task(
        "T15",
        HOME,
        "Switch the living room light on at 40 percent",
        call("set_light", room=pattern("living[ _]?room"), state="on", brightness=40),
    ),
    tool_task(
        "T18",
        HOME,
        "Add 'renew passport' to my to-do list with high priority, tagged travel and documents.",
        call("todo_add", task=pattern("renew passport"), priority="high", tags=["travel", "documents"]),
    ),
    tool_task(
        "P01",
        (get_weather, get_time),
        "What's the weather in Paris and in Rome?",
        weather("Paris"),
        weather("Rome"),
        final=r"(?=.*Paris)(?=.*Rome)",
    ),
    tool_task(
        "P02",
        HOME,
        "Turn on the light in the bedroom and set its thermostat to 19 degrees.",
        call("set_light", room="bedroom", state="on", brightness=Optional(100)),
        call("set_thermostat", room="bedroom", temperature=19),
    ),
    tool_task(
        "P03",
        MIX,
        "Convert 100 GBP to USD, and also 100 GBP to JPY.",
        convert(100, "GBP", "USD"),
        convert(100, "GBP", "JPY"),
        final=r"(?=.*125)(?=.*18[, ]?750)",
    ),
    tool_task(
        "P04",
        HOME,
        "Add three to-dos: buy milk, call mum, pay rent.",
        to_do("buy milk"),
        to_do("call mum"),
        to_do("pay rent"),
    ),
    tool_task(
        "R01",
        (find_user, get_user),
        "What is the e-mail address of the user Alice Smith?",
        call("find_user", name="Alice Smith"),
        call("get_user", user_id=31),
        final=r"alice\.smith@example\.org",
    ),
    tool_task(
        "R04",
        MATHS,
        "Multiply 12 by 13, then add 100 to the result.",
        call("multiply", a=12, b=13),
        call("add", a=one_of(156, 100), b=one_of(156, 100)),
        final=r"256",
    ),
    tool_task(
        "L02", MIX, "Combien font 125 euros en dollars américains ?", convert(125, "EUR", "USD"), final=r"135[.,]87"
    ),
    tool_task("N02", MIX, "What is the capital of France?", final=r"Paris"),
    tool_task(
        "N04",
        MIX,
        "Draft a short e-mail to my landlord about a dripping tap. Don't send it, I only want to read the text here.",
        final=r"tap|drip",
    ),
    tool_task("N08", (translate, get_time), "Hello! How are you?", final=r"\w"),
    tool_task("N12", HOME, "What can you do for me?", final=r"light|thermostat|to-?do|weather"),
    schema_task(
        "S01",
        llm.schema_dsl("name, age int"),
        "Rex is a 3 year old dog.",
        lambda value: value["name"] == "Rex" and value["age"] == 3,
    ),
    schema_task(
        "S02",
        llm.schema_dsl("name, age int, profession, city"),
        f"Extract the first person: {PEOPLE}",
        lambda value: (
            (value["name"], value["age"], value["city"]) == ("Maria Lopez", 42, "Madrid")
            and "engineer" in low(value["profession"])
        ),
    ),
    schema_task(
        "S03",
        several("name, age int, city"),
        f"Extract all people: {PEOPLE}",
        lambda value: (
            [(item["name"], item["age"], item["city"]) for item in value["items"]]
            == [("Maria Lopez", 42, "Madrid"), ("Ken Tanaka", 35, "Osaka"), ("Ann Lee", 29, "Dublin")]
        ),
    ),
    schema_task(
        "S04",
        llm.schema_dsl("title, author, year int"),
        "George Orwell's novel Nineteen Eighty-Four was published in 1949.",
        lambda value: "Orwell" in value["author"] and value["year"] == 1949,
    ),
    schema_task(
        "S05",
        object_of(sentiment={"type": "string", "enum": ["positive", "negative", "neutral"]}),
        "The food was cold and the waiter was rude. Never again!",
        lambda value: value["sentiment"] == "negative",
    ),
    schema_task(
        "S06",
        object_of(person=object_of(name=STRING, address=object_of(street=STRING, city=STRING, zip=STRING))),
        "John Doe lives at 5 Oak Lane, 90210 Beverly Hills.",
        lambda value: (
            value["person"]["name"] == "John Doe"
            and "Oak" in value["person"]["address"]["street"]
            and value["person"]["address"]["zip"] == "90210"
        ),
    ),
    schema_task(
        "S07",
        object_of(dish=STRING, ingredients=array_of(STRING), minutes=INTEGER),
        "For pancakes mix flour, milk and two eggs, and fry for 15 minutes.",
        lambda value: value["minutes"] == 15 and len(value["ingredients"]) == 3,
    ),
    schema_task(
        "S13",
        several("product, price float"),
        "Our offers: apples 1.20, bread 2.50, cheese 4.75 and milk 0.99.",
        lambda value: [item["price"] for item in value["items"]] == [1.2, 2.5, 4.75, 0.99],
    ),
    schema_task(
        "S17",
        several("name, age int, short_bio: one sentence"),
        "Invent 3 cool dogs",
        lambda value: len(value["items"]) == 3,
    ),
    schema_task(
        "S20",
        Team.model_json_schema(),
        "The team Rockets has two members: Ida, who is the pilot, and Sam, who is the mechanic.",
        lambda value: (
            "Rockets" in value["name"]
            and [(member["name"], low(member["role"])) for member in value["members"]]
            == [("Ida", "pilot"), ("Sam", "mechanic")]
        ),
    ),
    both_task(
        "B01",
        (get_user,),
        llm.schema_dsl("name, email"),
        Turn("Look up the user with id 31 and give me the name and the email.", (call("get_user", user_id=31),)),
        lambda value: value["email"] == "alice.smith@example.org",
    ),
)


# Our own tasks


def light_off(room: str) -> Call:
    return call("set_light", room=pattern(room), state="off", brightness=Optional(0))


def mail(to: str, subject: str, body: str) -> Call:
    return call("send_email", to=[to], subject=subject, body=pattern(body), cc=Optional([]))


ALICE: tuple[Call, ...] = (call("find_user", name="Alice Smith"), call("get_user", user_id=31))

OWN = (
    # Several calls
    tool_task(
        "C01",
        MIX,
        "Is it warmer in Oslo or in Lisbon right now?",
        weather("Oslo"),
        weather("Lisbon"),
        final=r"(?=.*Oslo)(?=.*Lisbon)|same",
    ),
    tool_task(
        "C02",
        HOME,
        "Turn off the lights in the kitchen, the hall and the bathroom.",
        light_off("kitchen"),
        light_off("hall"),
        light_off("bathroom"),
    ),
    tool_task(
        "C03",
        (get_stock_price, get_time, convert_currency),
        "What are the latest prices of the shares AAPL and MSFT?",
        call("get_stock_price", symbol="AAPL"),
        call("get_stock_price", symbol="MSFT"),
        final=r"231\.5",
    ),
    # Several rounds
    tool_task(
        "R11",
        (search_books, get_book),
        "How many pages does the book Dune have?",
        call("search_books", query=pattern("dune"), max_results=Optional(lambda value: value > 0)),
        call("get_book", book_id=88),
        final=r"412",
    ),
    tool_task(
        "R12",
        (get_stock_price, multiply),
        "Look up the latest price of the AAPL share, then multiply it by 12.",
        call("get_stock_price", symbol="AAPL"),
        call("multiply", a=one_of(231.5, 12), b=one_of(231.5, 12)),
        final=r"2[, ]?778",
    ),
    tool_task(
        "R13",
        (find_user, get_user, send_email),
        "Find out the e-mail address of the user Alice Smith, then send her an e-mail with the subject 'Invoice' "
        "and the text 'It is attached.'",
        *ALICE,
        mail("alice.smith@example.org", "Invoice", "it is attached"),
        final=r"sent|alice",
    ),
    tool_task(
        "R14",
        DEV,
        "Which files are in the directory src? Read the one that is there and tell me what it prints.",
        call("list_files", directory=pattern(r"^(\./)?src/?$")),
        call("read_file", path=pattern(r"^(\./)?src/main\.py$")),
        final=r"hello from main",
    ),
    tool_task(
        "R15",  # the tool fails
        DEV,
        "Read the file notes.txt and tell me what it says.",
        call("read_file", path=pattern(r"^(\./)?notes\.txt$")),
        final=r"n't|not |no such|unable",
    ),
    Task(
        "R16",  # a second question, which needs no tool
        "tool",
        (
            Turn("What's the weather in Madrid?", (weather("Madrid"),), r"17|rain"),
            Turn("Thank you. And which country is that city the capital of?", (), r"Spain"),
        ),
        (get_weather,),
    ),
    # Other languages
    tool_task("L11", HOME, "Mach bitte das Licht im Schlafzimmer aus.", light_off("schlafzimmer|bedroom")),
    tool_task(
        "L12",
        (get_weather, get_time),
        "¿Qué tiempo hace ahora en Sevilla?",
        weather("sevill"),
        final=r"17|lluvia|lloviendo|rain",
    ),
    tool_task(
        "L13",
        (get_weather, get_time),
        "東京は今何時ですか。",
        call("get_time", timezone="Asia/Tokyo"),
        final=r"(19|7)\s*[:時]\s*30|7時半",
    ),
    # No tool is needed, or none is wanted
    tool_task("N11", MIX, "Wie heißt die Hauptstadt von Italien?", final=r"\bRom\b"),
    tool_task("N13", (send_email, create_event), "Thanks, that was all I needed!", final=r"\w"),
    tool_task(
        "N14", HOME, "Suggest three things to do before moving house. Do not add them to my to-do list.", final=r"\w"
    ),
    tool_task(
        "N15",
        DEV,
        "Write an SQL query that counts the rows of the table orders. Don't run it, just show it.",
        final=r"SELECT",
    ),
    tool_task("N16", MIX, "What is 'good morning' in French?", final=r"bonjour"),
    # A tool and a schema together
    both_task(
        "B11",
        (get_book,),
        llm.schema_dsl("author, pages int, year int"),
        Turn("Look up the book with the id 88.", (call("get_book", book_id=88),)),
        lambda value: value == {"author": "Frank Herbert", "pages": 412, "year": 1965},
    ),
    both_task(
        "B12",
        (get_weather, get_time),
        object_of(city=STRING, temperature=INTEGER, unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
        Turn("What's the weather in Oslo right now?", (weather("Oslo"),)),
        lambda value: value == {"city": "Oslo", "temperature": 17, "unit": "celsius"},
    ),
    both_task(
        "B13",
        (find_user, get_user),
        llm.schema_dsl("email, plan"),
        Turn("Which e-mail address and which plan does the user Alice Smith have?", ALICE),
        lambda value: value == {"email": "alice.smith@example.org", "plan": "gold"},
    ),
    both_task(
        "B14",
        MIX,
        several("currency, amount float"),
        Turn(
            "How much are 100 US dollars in euros and in pounds?",
            (convert(100, "USD", "EUR"), convert(100, "USD", "GBP")),
        ),
        lambda value: sorted(item["amount"] for item in value["items"]) == [80, 92],
    ),
    both_task(
        "B15",
        MATHS,
        llm.schema_dsl("result float"),
        Turn("Multiply 1234 by 5678.", (call("multiply", a=one_of(1234, 5678), b=one_of(1234, 5678)),)),
        lambda value: value["result"] == 7006652,
    ),
    both_task(
        "B16",  # no tool is needed
        (get_weather, search_books),
        llm.schema_dsl("country, capital"),
        Turn("Extract: The capital of Norway is Oslo."),
        lambda value: value == {"country": "Norway", "capital": "Oslo"},
    ),
    # Schemas
    schema_task(
        "S31",
        several("name, age int, city"),
        "Finde alle Personen: Anna (31) wohnt in Köln, Paul ist 28 und kommt aus Wien.",
        lambda value: (
            [(item["name"], item["age"], item["city"]) for item in value["items"]]
            == [("Anna", 31, "Köln"), ("Paul", 28, "Wien")]
        ),
    ),
    schema_task(
        "S32",
        object_of(product=STRING, in_stock=BOOLEAN, tags=array_of(STRING)),
        "The desk lamp is sold out. Its tags are light and office.",
        lambda value: (
            "lamp" in low(value["product"]) and not value["in_stock"] and value["tags"] == ["light", "office"]
        ),
    ),
)

SETS = {"open": OPEN, "own": OWN}
