"""The chat page in a real browser: sending, stopping, editing, settings, keyboard and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.browser import Chat, Open
from tests.support.web_server import Answer, Server, says

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext


def test_answer_is_shown_piece_by_piece(chat: Chat, server: Server) -> None:
    server.will_say(says("Once upon", " a time", " there was a rabbit.", hold=2))
    chat.send("Tell me a story")
    chat.wait_for("Once upon a time")
    assert chat.said == ["Tell me a story", "Once upon a time"]
    server.release()
    chat.finished()
    assert chat.said[1] == "Once upon a time there was a rabbit."
    assert server.last["messages"] == [{"role": "user", "content": "Tell me a story"}]
    assert server.last["model"] == "tiny"
    assert server.last["stream"] is True and server.last["stream_options"] == {"include_usage": True}
    assert chat.page.locator("#context-text").inner_text() == "13 of 4,096 context"
    assert chat.page.locator("#speed").inner_text().startswith("3 tokens")


def test_whole_conversation_is_sent(chat: Chat, server: Server) -> None:
    server.will_say(says("Hello."), says("Fine."))
    chat.ask("Hi")
    chat.ask("How are you?")
    assert server.last["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How are you?"},
    ]


def test_stop_and_continue(chat: Chat, server: Server) -> None:
    server.will_say(says("The rabbit ", "ran", hold=1), says("hid."))
    chat.send("Go on")
    chat.wait_for("The rabbit")
    chat.button("Stop").click()
    chat.finished()
    assert server.cancelled.acquire(timeout=20)
    chat.wait_for("Stopped before the end.")
    chat.button("Continue").click()
    chat.wait_for("The rabbit hid.")
    assert server.last["messages"][-1] == {"role": "assistant", "content": "The rabbit "}
    assert server.last["continue_final_message"] is True and server.last["add_generation_prompt"] is False
    assert chat.page.get_by_text("Stopped before the end.").count() == 0


def test_token_limit_is_shown(chat: Chat, server: Server) -> None:
    server.will_say(says("One, two", finish="length"))
    chat.ask("Count")
    chat.wait_for("Reached the token limit.")


def test_regenerate_and_undo(chat: Chat, server: Server) -> None:
    server.will_say(says("First."), says("Second."))
    chat.ask("Say a word")
    chat.button("Regenerate").click()
    chat.wait_for("Second.")
    assert chat.said == ["Say a word", "Second."]
    assert server.last["messages"] == [{"role": "user", "content": "Say a word"}]
    chat.button("Undo").click()
    chat.wait_for("First.")
    assert chat.said == ["Say a word", "First."]


def test_edited_question_restarts_the_conversation(chat: Chat, server: Server) -> None:
    server.will_say(says("Paris."), says("Yes."), says("Rome."))
    chat.ask("The capital of France?")
    chat.ask("Sure?")
    chat.page.locator("article.user").first.hover()
    chat.page.locator("article.user").first.get_by_role("button", name="Edit").click()
    chat.page.get_by_label("Edit the text").fill("The capital of Italy?")
    chat.page.locator("article").get_by_role("button", name="Send").click()
    chat.wait_for("Rome.")
    assert chat.said == ["The capital of Italy?", "Rome."]
    assert server.last["messages"] == [{"role": "user", "content": "The capital of Italy?"}]


def test_edited_answer_is_continued(chat: Chat, server: Server) -> None:
    server.will_say(says("I cannot."), says(" here is one: 42."))
    chat.ask("A number?")
    chat.button("Edit the answer").click()
    chat.page.get_by_label("Edit the text").fill("Gladly,")
    chat.button("Save and continue").click()
    chat.wait_for("Gladly, here is one: 42.")
    assert server.last["messages"][-1] == {"role": "assistant", "content": "Gladly,"}


def test_edited_answer_is_saved(chat: Chat, server: Server) -> None:
    server.will_say(says("Blue."), says("Because."))
    chat.ask("A colour?")
    chat.button("Edit the answer").click()
    chat.page.get_by_label("Edit the text").fill("Green.")
    chat.button("Save").click()
    chat.wait_for("Green.")
    chat.ask("Why?")
    assert [message["content"] for message in server.last["messages"]] == ["A colour?", "Green.", "Why?"]


def test_models_settings_and_system_prompt_are_sent(chat: Chat, server: Server) -> None:
    options = chat.page.locator("#model option").all_inner_texts()
    assert options == ["tiny", "large (loads on first use)"]  # without the classifier
    chat.page.get_by_label("Model").select_option("large")
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature", exact=True).fill("0.2")
    chat.page.get_by_label("Top-k", exact=True).fill("9999")
    chat.page.get_by_label("Seed").fill("7")
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.ask("Hi")
    sent = server.last
    assert sent["model"] == "large"
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["top_k"], sent["seed"]) == (0.2, 200, 7)
    assert (sent["max_tokens"], sent["top_p"], sent["repetition_penalty"]) == (1024, 0.95, 1)
    chat.button("Reset to defaults").click()
    chat.ask("Hi")
    assert server.last["temperature"] == 0.7 and "seed" not in server.last


def test_example_sets_the_system_prompt(chat: Chat, server: Server) -> None:
    chat.button("Español").click()
    chat.page.get_by_role("button", name="Cuentacuentos").click()
    assert chat.page.get_by_label("Message", exact=True).input_value().startswith("Cuéntame")
    chat.button("Send").click()
    chat.finished()
    assert server.last["messages"][0]["role"] == "system"
    assert "cuentacuentos" in server.last["messages"][0]["content"]


def test_errors_are_shown_and_can_be_retried(chat: Chat, server: Server) -> None:
    server.will_say(
        Answer(status=429, fails="Too many requests are waiting.", retry_after=7),
        Answer(pieces=("Half an ",), fails="The engine stopped."),
        says("answer."),
    )
    chat.send("Hello")
    chat.wait_for("Too many requests are waiting. Try again in 7 s.")
    assert chat.said == ["Hello"]
    chat.button("Try again").click()
    chat.wait_for("The engine stopped.")
    chat.wait_for("Ended by an error.")
    chat.button("Continue").click()
    chat.wait_for("Half an answer.")
    assert chat.page.locator(".failure").count() == 0


def test_key_is_requested_and_kept_for_the_tab(open_chat: Open, server: Server) -> None:
    server.key = "secret"
    chat = open_chat(ready=False)
    chat.page.get_by_role("textbox", name="API key").fill("wrong")
    chat.button("Use this key").click()
    chat.page.locator("#key-dialog[open] #key").fill("secret")
    chat.button("Use this key").click()
    chat.ready()
    chat.ask("Hi")
    chat.reload()
    assert chat.said == ["Hi", "You said: Hi"]
    open_chat(ready=False).page.locator("#key-dialog[open]").wait_for()


def test_remembered_key_works_in_every_tab(open_chat: Open, server: Server) -> None:
    server.key = "secret"
    chat = open_chat(ready=False)
    chat.page.get_by_role("textbox", name="API key").fill("secret")
    chat.page.get_by_label("Remember it in this browser").check()
    chat.button("Use this key").click()
    chat.ready()
    open_chat()


def test_copy_buttons(chat: Chat, server: Server) -> None:
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.will_say(says("So:\n\n```python\nprint('<b>')\n```\n"))
    chat.ask("Code?")
    assert chat.page.locator(".code-head span").inner_text() == "python"
    chat.button("Copy code").click()
    chat.page.locator(".code-head use[href='#icon-check']").wait_for(state="attached")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print('<b>')"
    chat.page.locator("article.assistant .tools").get_by_role("button", name="Copy").click()
    chat.page.locator(".tools use[href='#icon-check']").wait_for(state="attached")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "So:\n\n```python\nprint('<b>')\n```\n"


def test_page_works_over_plain_http(open_chat: Open, server: Server) -> None:
    """Pages over plain HTTP have no clipboard, no locks and no random UUIDs."""
    server.url = server.url.replace("127.0.0.1", "chat.test")
    chat = open_chat()
    assert chat.page.evaluate("[isSecureContext, typeof navigator.clipboard]") == [False, "undefined"]
    chat.ask("Hello")
    chat.page.locator("article.assistant .tools").get_by_role("button", name="Copy").click()
    chat.page.locator(".tools use[href='#icon-check']").wait_for(state="attached")
    chat.page.locator("#input").focus()
    chat.page.keyboard.press("Control+V")
    assert chat.page.locator("#input").input_value() == "You said: Hello"
    chat.stored("You said: Hello")
    chat.reload()
    assert chat.said == ["Hello", "You said: Hello"]


def test_page_works_without_storage(context: BrowserContext, open_chat: Open) -> None:
    context.add_init_script("""
      for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
        Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });
      }
    """)
    chat = open_chat()
    chat.ask("Hello")
    chat.page.get_by_text("This browser stores nothing for this page").wait_for()
    assert chat.said == ["Hello", "You said: Hello"]


def test_page_works_with_the_keyboard(chat: Chat, server: Server) -> None:
    server.will_say(says("One", " two", hold=1), says("Three."))
    press = chat.page.keyboard.press
    chat.page.locator("#input:focus").wait_for()
    chat.page.keyboard.type("first line")
    press("Shift+Enter")
    chat.page.keyboard.type("second line")
    press("Enter")
    chat.wait_for("One")
    assert server.last["messages"][0]["content"] == "first line\nsecond line"
    press("Escape")
    chat.wait_for("Stopped before the end.")
    # Backwards from the message field, the first button is Regenerate.
    press("Shift+Tab")
    assert chat.page.evaluate("document.activeElement.ariaLabel") == "Regenerate"
    press("Enter")
    chat.wait_for("Three.")
    chat.finished()
    press("Control+Home")
    chat.page.locator("#skip").focus()
    press("Enter")
    assert chat.page.evaluate("document.activeElement.id") == "input"


def test_focus_is_visible(chat: Chat) -> None:
    chat.ask("Hi")
    for _ in range(25):
        chat.page.keyboard.press("Tab")
        seen = chat.page.evaluate("""() => {
          const one = document.activeElement;
          if (one === document.body || one.id === "input") return true;
          const style = getComputedStyle(one);
          return style.outlineStyle !== "none" || one.ariaLabel;
        }""")
        assert seen is True


def test_complete_paragraphs_are_announced(chat: Chat, server: Server) -> None:
    server.will_say(says("First paragraph.\n\n", "Second ", "paragraph.\n\nThird", " one.", hold=2))
    chat.send("Talk")
    chat.wait_for("Second")
    spoken = chat.page.locator("#spoken")
    spoken.get_by_text("First paragraph.").wait_for(state="attached")
    assert "Second" not in (spoken.text_content() or "")
    server.release()
    spoken.get_by_text("End of the answer.").wait_for(state="attached")
    parts = [text for text in spoken.locator("p").all_text_contents() if text]
    assert parts == ["Answering", "First paragraph.", "Second paragraph.", "Third one.", "End of the answer."]


def test_layout_on_a_phone(chat: Chat, server: Server) -> None:
    chat.page.set_viewport_size({"width": 390, "height": 844})
    chat.ask("Hello")
    width = chat.page.evaluate("document.documentElement.scrollWidth")
    assert width == 390
    assert not chat.page.locator("#sidebar").is_visible()
    chat.button("Conversations").click()
    chat.page.get_by_role("link", name="Hello").wait_for()
    assert chat.page.evaluate("document.activeElement.closest('#sidebar') !== null")
    chat.page.keyboard.press("Escape")
    assert not chat.page.locator("#sidebar").is_visible()
    chat.button("Conversations").click()
    chat.button("New conversation").click()
    assert not chat.page.locator("#sidebar").is_visible()
    assert chat.said == []
    chat.button("Settings").click()
    assert chat.page.locator("#settings").is_visible()
    chat.button("Close the settings").click()
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 390


BELOW = "area => area.scrollHeight - area.scrollTop - area.clientHeight"


def test_scrolled_up_page_does_not_move(chat: Chat, server: Server) -> None:
    lines = "\n\n".join(f"Line {number}" for number in range(80))
    server.will_say(says(lines, "\n\nThe end", hold=1))
    chat.send("Count")
    chat.wait_for("Line 79")
    assert chat.page.locator("#scroll").evaluate(BELOW) < 5
    chat.page.locator("#scroll").hover()
    chat.page.mouse.wheel(0, -600)
    chat.page.locator("#to-bottom:visible").wait_for()
    place = chat.page.evaluate("document.getElementById('scroll').scrollTop")
    server.release()
    chat.finished()
    assert chat.page.evaluate("document.getElementById('scroll').scrollTop") == place
    chat.button("To the newest message").click()
    chat.page.locator("#to-bottom").wait_for(state="hidden")
    assert chat.page.locator("#scroll").evaluate(BELOW) < 5


def test_light_and_dark(chat: Chat) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    chat.page.emulate_media(color_scheme="dark")
    dark = chat.page.evaluate(ground)
    chat.button("Light").click()
    light = chat.page.evaluate(ground)
    assert light != dark
    chat.reload()
    assert chat.page.evaluate(ground) == light
    chat.button("System").click()
    assert chat.page.evaluate(ground) == dark
