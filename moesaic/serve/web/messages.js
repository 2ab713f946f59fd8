/** The messages of the open conversation, and the answer that is being written. */

import { byId, element, textButton } from "./dom.js";
import { copyAndTell, MessageView } from "./message.js";
import { Scroller } from "./scroll.js";

/** @typedef {import("./conversation.js").Message} Message @typedef {import("./generation.js").Generation} Generation */

const FRAME = 8; // ms that showing new text may take of a frame

export class MessagesView {
  #root = byId("messages");
  #spoken = byId("spoken");
  #scroller = new Scroller(byId("scroll"), byId("to-bottom"));
  #waiting = element("div", { class: "waiting", "aria-hidden": "true" }, element("i"), element("i"), element("i"));
  /** @type {WeakMap<Message, MessageView>} */
  #views = new WeakMap();
  #opened = "";
  #scheduled = false;

  /** @param {import("./chat.js").Chat} chat */
  constructor(chat) {
    this.chat = chat;
    /** @type {import("./message.js").Actions} */
    this.actions = {
      ask: (message, text) => chat.ask(this.#place(message), text),
      correct: (message, text, goOn) => chat.correct(this.#place(message), text, goOn),
      regenerate: (message) => chat.regenerate(this.#place(message)),
      proceed: () => chat.proceed(),
    };
    this.#root.addEventListener("click", (event) => {
      const button = /** @type {Element} */ (event.target).closest("button");
      if (button?.dataset.action !== "copy-code") return;
      void copyAndTell(button.closest(".code")?.querySelector("code")?.textContent ?? "", button);
    });
    chat.addEventListener("opened", () => this.show());
    chat.addEventListener("grew", () => this.#schedule());
    chat.addEventListener("ended", () => this.#end());
  }

  /** @param {Message} message @returns {number} */
  #place(message) {
    return this.chat.conversation.messages.indexOf(message);
  }

  /** @param {Message} message @returns {MessageView} */
  #viewOf(message) {
    const found = this.#views.get(message) ?? new MessageView(message, this.actions);
    this.#views.set(message, found);
    return found;
  }

  /** Shows the conversation as it is. */
  show() {
    const { conversation, generation } = this.chat;
    const views = conversation.messages.map((message) => this.#viewOf(message));
    const nodes = views.map(({ node }) => node);
    const shown = [...this.#root.querySelectorAll("article")];
    const kept = nodes.findIndex((node, place) => shown[place] !== node);
    const from = kept < 0 ? nodes.length : kept;
    // Nodes that stay are not touched, so that a selection, an editor and the reader's place survive.
    for (const node of [...this.#root.children].slice(from)) node.remove();
    this.#root.append(...nodes.slice(from));
    views.forEach((view, place) => {
      view.grow();
      view.update({
        last: place === views.length - 1,
        writing: generation !== undefined && view.message === generation.message,
        busy: generation !== undefined,
      });
    });
    if (generation && !generation.begun) this.#wait(generation.message);
    if (this.chat.elsewhere) this.#root.append(element("p", { class: "elsewhere" }, "The answer is being written in another tab."));
    const other = this.#opened !== conversation.id;
    this.#opened = conversation.id;
    if (views.length === 0) this.#scroller.reset();
    else if (other || generation) this.#scroller.pin();
    else this.#scroller.follow();
  }

  /** @param {Message} message */
  #wait(message) {
    this.#viewOf(message).takeSettled(); // what is continued has been read
    this.#root.append(this.#waiting);
    this.#spoken.replaceChildren(element("p", {}, "Answering"));
  }

  /** Shows new text with the next frame: tokens can come faster than anybody sees. */
  #schedule() {
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      const began = performance.now();
      this.#grow();
      const took = performance.now() - began;
      // Text that takes long to lay out comes in larger steps, which leaves the reader time to scroll.
      setTimeout(
        () => {
          this.#scheduled = false;
          if (this.chat.generation) this.#schedule();
        },
        took > FRAME ? 4 * took : 0,
      );
    });
  }

  #grow() {
    const { generation } = this.chat;
    if (!generation?.begun) return;
    this.#waiting.remove();
    const view = this.#viewOf(generation.message);
    if (view.node.isConnected) view.grow();
    else this.show();
    this.#speak(view.takeSettled());
    this.#scroller.follow();
  }

  /**
   * Has paragraphs read out when they are complete: a live region around the text itself would read every token.
   * @param {readonly HTMLElement[]} nodes
   */
  #speak(nodes) {
    this.#spoken.append(...nodes.map((node) => element("p", { dir: "auto" }, node.textContent)));
  }

  #end() {
    this.#waiting.remove();
    this.show();
    const last = this.chat.conversation.messages.at(-1);
    if (last?.role !== "assistant") return;
    const view = this.#viewOf(last);
    this.#speak([...view.takeSettled(), ...view.tail]);
    this.#spoken.append(element("p", {}, last.cut ? "The answer is not complete." : "End of the answer."));
  }

  /**
   * Shows below the messages what went wrong.
   * @param {string} text
   * @param {() => void} again what may help
   */
  fail(text, again) {
    const retry = textButton("Try again", "quiet-button", () => {
      failure.remove();
      again();
    });
    const failure = element("div", { class: "failure", role: "alert" }, element("span", {}, text), retry);
    this.#root.querySelector(".failure")?.remove();
    this.#root.append(failure);
    this.#scroller.follow();
  }
}
