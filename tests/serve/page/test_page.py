"""What a person can do on the chat page, done by a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.page_lab import ANSWERS, Page, Server
from support.scripted import Reply

TOOL = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
CALL = '</think><tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def text_of(message: Any) -> str:
    return message.locator(".text").inner_text().strip()


def bodies(page: Page) -> list[dict[str, Any]]:
    """Begins to collect the bodies of the chat requests."""
    found: list[dict[str, Any]] = []
    page.tab.on("request", lambda r: found.append(json.loads(r.post_data)) if "/chat/" in r.url else None)
    return found


def test_an_answer_is_shown_as_markdown_with_its_figures(page: Page) -> None:
    ANSWERS["mark"] = Reply("</think># Title\n\n**bold** and `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n", reused=5)
    answer = page.ask("mark")
    assert answer.locator("h1").inner_text() == "Title"
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    note = answer.locator(".note").inner_text()
    assert "tokens" in note
    assert "first after" in note
    assert "5 of" in note
    assert page.tab.locator("#cache-figure").inner_text() == "5 tokens from the cache"
    assert "of 4,096" in page.tab.locator("#context-figure").inner_text()
    assert page.state("document.querySelector('#context').value") > 0


def test_reasoning_is_folded(page: Page) -> None:
    ANSWERS["think"] = "first I think</think>then I answer"
    answer = page.ask("think")
    assert text_of(answer) == "then I answer"
    thoughts = answer.locator("details.reasoning")
    assert not thoughts.locator("pre").is_visible()
    thoughts.locator("summary").click()
    assert thoughts.locator("pre").inner_text() == "first I think"


def test_stop_ends_the_generation_and_keeps_what_there_is(page: Page, server: Server) -> None:
    ANSWERS["long"] = Reply("</think>" + "word " * 500, delay=0.02)
    for end in (lambda: page.tab.click("#stop"), lambda: page.tab.keyboard.press("Escape")):
        page.write("long")
        page.tab.locator(".message.running .text", has_text="word word").last.wait_for()
        before = len(server.backend.ended)
        end()
        answer = page.ended()
        assert text_of(answer).startswith("word word")
        assert "stopped" in answer.locator(".note").inner_text()
        page.tab.locator(".message.assistant button", has_text="Go on").last.wait_for()
        assert len(server.backend.running) == 0 or server.backend.running[-1].cancelled.is_set()
        assert before <= len(server.backend.ended)


def test_go_on_continues_the_same_answer(page: Page) -> None:
    ANSWERS["half"] = Reply("</think>one two", reason="length")
    page.ask("half")
    sent = bodies(page)
    ANSWERS["half"] = " three"
    page.tab.locator("button", has_text="Go on").click()
    answer = page.ended()
    assert page.tab.locator(".message.assistant").count() == 1
    assert text_of(answer).startswith("one two")
    assert sent[0]["continue_final_message"] is True
    assert sent[0]["messages"][-1]["content"] == "one two"


def test_again_and_edit_make_branches(page: Page) -> None:
    ANSWERS["roll"] = "</think>first"
    page.ask("roll")
    ANSWERS["roll"] = "</think>second"
    page.tab.locator("button", has_text="Again").click()
    assert text_of(page.ended()) == "second"
    bar = page.tab.locator(".message.assistant .bar")
    assert "2/2" in bar.inner_text()
    bar.get_by_title("Earlier version").click()
    assert text_of(page.tab.locator(".message.assistant")) == "first"
    page.tab.locator(".message.user button", has_text="Edit").click()
    page.tab.fill(".editor textarea", "other words")
    page.tab.locator(".editor button", has_text="Save").click()
    assert "other words" in text_of(page.ended())
    assert "2/2" in page.tab.locator(".message.user .bar").inner_text()
    page.tab.locator(".message.user").get_by_title("Earlier version").click()
    assert text_of(page.tab.locator(".message.user")) == "roll"


def test_an_edit_can_be_left(page: Page) -> None:
    page.ask("stay")
    page.tab.locator(".message.user button", has_text="Edit").click()
    page.tab.keyboard.type(" never")
    page.tab.keyboard.press("Escape")
    assert text_of(page.tab.locator(".message.user")) == "stay"
    assert page.tab.locator(".editor").count() == 0


def test_a_tool_call_is_shown_and_can_be_answered(page: Page) -> None:
    ANSWERS["rain?"], ANSWERS["rain? after the tool"] = CALL, "</think>It rains."
    page.tab.click("#toggle-settings")
    page.tab.fill("#tools", TOOL)
    page.tab.locator("#tools").blur()
    answer = page.ask("rain?")
    assert answer.locator(".call summary").inner_text() == "calls weather"
    assert json.loads(answer.locator(".call code").inner_text()) == {"city": "Oslo"}
    sent = bodies(page)
    answer.locator(".answer textarea").fill("wet")
    answer.locator("button", has_text="Answer the call").click()
    assert text_of(page.ended()) == "It rains."
    *_, call, result = sent[0]["messages"]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    assert result["content"] == "wet"
    assert page.tab.locator(".answer:visible").count() == 0


def test_tools_that_are_no_json_are_refused_in_words(page: Page) -> None:
    page.tab.click("#toggle-settings")
    page.tab.fill("#tools", "[{")
    page.tab.locator("#tools").blur()
    assert "Not used" in page.tab.locator("#tools-trouble").inner_text()


def test_the_settings_go_into_the_request_and_outlive_the_page(page: Page) -> None:
    page.tab.click("#toggle-settings")
    page.tab.fill("#system", "Be brief.")
    page.tab.fill("#sampling-temperature", "0.3")
    page.tab.fill("#sampling-top_k", "7")
    page.tab.locator("#sampling-top_k").blur()
    page.tab.select_option("#effort", "low")
    sent = bodies(page)
    page.ask("hello")
    body = sent[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"], body["reasoning_effort"]) == (0.3, 7, "low")
    assert "min_p" not in body
    assert body["stream"] is True
    assert body["model"] == "scripted"
    page.open()
    page.ask("again")
    assert (sent[1]["temperature"], sent[1]["top_k"]) == (0.3, 7)
    assert sent[1]["messages"][0]["role"] == "user"  # the system prompt belongs to its conversation


def test_another_model_can_be_picked(page: Page) -> None:
    page.tab.select_option("#model", "other")
    sent = bodies(page)
    page.ask("who?")
    page.open()
    page.ask("and now?")
    assert [body["model"] for body in sent] == ["other", "other"]


def test_a_model_that_is_not_loaded_says_so_and_can_be_loaded(page: Page) -> None:
    states = ["unloaded", "loaded"]
    asked: list[str] = []

    def models(route: Any) -> None:
        state = states[min(len(asked), 1)]
        card = {"id": "big", "max_model_len": 100, "status": {"value": state}}
        route.fulfill(json={"data": [card]})

    def load(route: Any) -> None:
        asked.append(route.request.post_data)
        route.fulfill(json={"success": True})

    plan = {"n_ctx": 4096, "bytes": 5_250_000_000, "fits": False}
    page.tab.route("**/v1/models", models)
    page.tab.route("**/v1/models/big/plan", lambda route: route.fulfill(json=plan))
    page.tab.route("**/models/load", load)
    page.open()
    assert page.tab.locator("#model option").inner_text() == "big (unloaded)"
    page.tab.locator("#model-state", has_text="does not fit: 5.3 GB with a context of 4,096").wait_for()
    page.tab.click("#load-model")
    page.tab.locator("#load-model").wait_for(state="hidden")
    page.tab.locator("#model option", has_text=re.compile("^big$")).wait_for(state="attached")
    assert [json.loads(each) for each in asked] == [{"model": "big"}]


def test_the_history_outlives_the_page(page: Page) -> None:
    page.ask("remember me")
    page.open()
    page.tab.locator("#chat-list .open", has_text="remember me").click()
    assert text_of(page.tab.locator(".message.user")) == "remember me"
    page.tab.fill("#search", "no such words")
    page.tab.locator("#chat-list .entry").first.wait_for(state="detached")
    page.tab.fill("#search", "remember")
    page.tab.locator("#chat-list .open").wait_for()
    page.tab.on("dialog", lambda dialog: dialog.accept())
    page.tab.locator("#chat-list .drop").click()
    page.tab.locator("#chat-list .entry").first.wait_for(state="detached")
    assert page.tab.locator(".message").count() == 0


def test_conversations_are_exported_and_imported(page: Page, browser: Any, server: Server, tmp_path: Path) -> None:
    ANSWERS["roll"] = "</think>one"
    page.ask("roll")
    page.tab.locator("button", has_text="Again").click()
    page.ended()
    with page.tab.expect_download() as download:
        page.tab.click("#export")
    download.value.save_as(tmp_path / "chats.json")
    other = Page(browser, server.url)
    other.tab.set_input_files("#import-file", tmp_path / "chats.json")
    other.tab.locator("#chat-list .open", has_text="roll").click()
    assert "2/2" in other.tab.locator(".message.assistant .bar").inner_text()
    other.context.close()


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "{}",
        '{"format": "zincmetal-chats-1", "chats": [{"leaf": "a", "nodes": {}}]}',
        '{"format": "zincmetal-chats-1", "chats": [{"leaf": "a", "nodes": {"a": {"id": "a", "parent": "a", '
        '"role": "user", "content": "x"}}}]}',
    ],
)
def test_a_file_that_is_none_is_refused_in_words(page: Page, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    page.tab.set_input_files("#import-file", tmp_path / "bad.json")
    assert "Nothing was imported" in page.tab.locator("#trouble").inner_text()
    assert page.tab.locator("#chat-list .entry").count() == 0


def test_the_keyboard_is_enough(page: Page) -> None:
    page.tab.keyboard.type("line one")
    page.tab.keyboard.press("Shift+Enter")
    page.tab.keyboard.type("line two")
    assert page.tab.locator("#input").input_value() == "line one\nline two"
    page.tab.keyboard.press("Enter")
    page.ended()
    assert text_of(page.tab.locator(".message.user")) == "line one\nline two"
    page.tab.keyboard.press("Control+Shift+O")
    assert page.tab.locator(".message").count() == 0
    page.tab.locator("#input").blur()
    page.tab.keyboard.press("/")
    assert page.state("document.activeElement.id") == "input"
    for _ in range(40):  # every control can be reached
        page.tab.keyboard.press("Tab")
        if page.state("document.activeElement.id") == "toggle-theme":
            break
    assert page.state("document.activeElement.id") == "toggle-theme"


def test_light_dark_and_as_the_system(page: Page) -> None:
    def ground() -> Any:
        return page.state("getComputedStyle(document.body).backgroundColor")

    page.tab.emulate_media(color_scheme="dark")
    dark = ground()
    page.tab.click("#toggle-theme")
    light = ground()
    assert dark != light
    page.open()
    assert ground() == light
    page.tab.click("#toggle-theme")
    assert ground() == dark
    page.tab.emulate_media(color_scheme="light")
    assert ground() == dark
    page.tab.click("#toggle-theme")
    assert ground() == light


def test_on_a_telephone_nothing_is_wider_than_the_screen(page: Page) -> None:
    page.tab.set_viewport_size({"width": 360, "height": 640})
    page.open()
    ANSWERS["wide"] = "</think>" + "w" * 500 + "\n\n```\n" + "c" * 500 + "\n```\n\n|" + "a|" * 40 + "\n|" + "-|" * 40
    page.ask("wide")
    assert page.state("document.documentElement.scrollWidth") <= 360
    assert not page.tab.locator("#history").is_visible()
    page.tab.click("#toggle-history")
    assert page.tab.locator("#history").is_visible()


def test_every_control_has_a_name_and_the_language_is_set(page: Page) -> None:
    page.ask("hello")
    page.tab.click("#toggle-settings")
    session = page.context.new_cdp_session(page.tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "combobox", "spinbutton", "searchbox", "meter", "log", "complementary"}
    shown = [n for n in nodes if not n["ignored"] and n["role"]["value"] in controls]
    assert len(shown) > 20
    assert [n for n in shown if not n.get("name", {}).get("value")] == []
    assert page.state("document.documentElement.lang") == "en"
    page.tab.locator("#announce", has_text="complete").wait_for(state="attached")


def test_a_key_is_asked_for_and_sent(page: Page) -> None:
    seen: list[str | None] = []

    def models(route: Any) -> None:
        given = route.request.headers.get("authorization")
        seen.append(given)
        if given != "Bearer secret":
            route.fulfill(status=401, json={"error": {"message": "no key", "code": "invalid_api_key"}})
        else:
            route.fulfill(json={"data": [{"id": "scripted", "status": {"value": "loaded"}}]})

    page.tab.route("**/v1/models", models)
    page.open()
    assert "wants a key" in page.tab.locator("#trouble").inner_text()
    page.tab.fill("#key", "secret")
    page.tab.locator("#key").blur()
    page.tab.locator("#trouble").wait_for(state="hidden")
    assert seen[-1] == "Bearer secret"
    assert page.state("localStorage.length ? JSON.stringify(localStorage) : ''").find("secret") == -1


def test_a_cut_connection_is_said_and_what_came_is_kept(page: Page) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "half an ans"}}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.tab.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    answer = page.ask("cut")
    assert text_of(answer) == "half an ans"
    assert "connection was lost" in answer.locator(".note").inner_text()
    page.tab.unroute("**/chat/completions")
    page.tab.locator("button", has_text="Again").click()
    assert "You said" in text_of(page.ended())


def test_a_server_that_is_gone_is_said(page: Page) -> None:
    page.tab.route("**/v1/**", lambda route: route.abort())
    answer = page.ask("anyone?")
    assert "cannot be reached" in answer.locator(".note").inner_text()
    assert page.tab.locator("#input").is_enabled()


def test_an_error_of_the_model_is_said(page: Page) -> None:
    ANSWERS["break"] = Reply("</think>some text", error=RuntimeError("boom"), error_after=14)
    answer = page.ask("break")
    assert answer.locator(".note.trouble").inner_text()
    assert "boom" not in answer.inner_text()


HOSTILE = (
    "<script>window.bad = 1; fetch('http://evil.example/a')</script>",
    '<img src=x onerror="window.bad = 2">',
    "<img src='http://evil.example/b.png'>",
    "![p](http://evil.example/c.png)",
    "![p](data:text/html,<script>window.bad=3</script>)",
    "[link](javascript:window.bad=4)",
    "<a href='javascript:window.bad=5'>link</a>",
    "<iframe srcdoc='<script>parent.bad=6</script>'></iframe>",
    "<svg onload='window.bad=7'><script>window.bad=8</script></svg>",
    "<math><mtext><style><img src onerror=window.bad=9></style></mtext></math>",
    "<form action='http://evil.example/d'><button>Send</button></form>",
    "<style>body{background:url(http://evil.example/e)}</style>",
    "<p style='position:fixed;inset:0;background:url(http://evil.example/f)'>over</p>",
    "<link rel=stylesheet href=http://evil.example/g.css><meta http-equiv=refresh content='0;url=http://evil.example/h'>",
    "<base href='http://evil.example/'><object data='http://evil.example/i'></object>",
    '```html"><script>window.bad=10</script>\n<b>x</b>\n```',
    "```python onmouseover=window.bad=11\nprint(1)\n```",
    "$\\href{javascript:window.bad=12}{x}$ and $\\url{http://evil.example/j}$ $\\includegraphics{http://evil.example/k}$",
    "<details open ontoggle='window.bad=13'><summary>s</summary></details>",
    "<div id='input' name='querySelector'>clobber</div><input id=send>",
    "\u202e<a title='\"><img src=x onerror=window.bad=14>' href='http://ok.example'>t</a>",
    "<template><script>window.bad=15</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=window.bad=16>'>",
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_a_model_writes_runs_or_calls_out(page: Page, text: str) -> None:
    ANSWERS["attack"] = f"</think>{text}\n\nend of it {text}"
    answer = page.ask("attack")
    answer.locator("button", has_text="Copy").last.wait_for()
    page.tab.wait_for_load_state("networkidle")
    assert page.state("window.bad") is None
    assert [url for url in page.requests if not url.startswith((page.url, "data:image"))] == []
    inside = answer.locator(".text")
    assert inside.locator("script, iframe, object, form, style, img, svg[onload], base, link, input").count() == 0
    links = inside.locator("a")
    for i in range(links.count()):
        assert links.nth(i).get_attribute("rel") == "noopener noreferrer nofollow"
        assert (links.nth(i).get_attribute("href") or "#").startswith(("http://", "https://", "mailto:", "#"))
    assert page.ask("still alive?")
    assert page.tab.locator("#input").is_enabled()


def test_titles_reasoning_and_calls_of_a_model_are_text(page: Page) -> None:
    bad = "<img src=x onerror='window.bad=1'>"
    ANSWERS[bad] = f"{bad}</think><tool_call>\n{json.dumps({'name': bad, 'arguments': {bad: bad}})}\n</tool_call>"
    page.tab.click("#toggle-settings")
    page.tab.fill("#tools", TOOL)
    page.tab.locator("#tools").blur()
    page.ask(bad)
    assert page.tab.locator("#messages img, #chat-list img").count() == 0
    assert page.state("window.bad") is None


def test_code_is_coloured_and_copied(page: Page) -> None:
    ANSWERS["code"] = "</think>```python\ndef f():\n    return '<b>'\n```\n"
    answer = page.ask("code")
    answer.locator(".hljs-keyword").first.wait_for()
    answer.locator(".code-bar button").click()
    answer.locator(".code-bar button", has_text="Copied").wait_for()
    assert page.state("navigator.clipboard.readText()") == "def f():\n    return '<b>'\n"


def test_formulas_are_drawn_and_prices_are_not(page: Page) -> None:
    ANSWERS["maths"] = "</think>It costs $5 or $6. But $x^2$ and\n\n$$\\frac{1}{2}$$\n"
    answer = page.ask("maths")
    answer.locator(".katex").nth(1).wait_for()
    assert answer.locator(".katex").count() == 2
    assert "It costs $5 or $6." in answer.inner_text()
