/** Keeps the end of the conversation in view, but only for a reader who is there. */

const NEAR = 24; // px

export class Scroller {
  #pinned = true;
  #before = 0;

  /**
   * @param {HTMLElement} area
   * @param {HTMLButtonElement} button takes the reader to the end
   */
  constructor(area, button) {
    this.area = area;
    this.button = button;
    area.addEventListener("scroll", () => this.#moved(), { passive: true });
    button.addEventListener("click", () => this.pin());
    // The window, the keyboard of a phone or an editor can change the height as well.
    const observer = new ResizeObserver(() => this.follow());
    observer.observe(area);
    for (const child of area.children) observer.observe(child);
  }

  #moved() {
    const { scrollTop, scrollHeight, clientHeight } = this.area;
    const left = scrollHeight - scrollTop - clientHeight;
    if (left < NEAR) this.#pinned = true;
    else if (scrollTop < this.#before) this.#pinned = false; // only the reader scrolls up
    this.#before = scrollTop;
    this.#offer();
  }

  /** Goes to the beginning, where there is nothing to follow. */
  reset() {
    this.#pinned = false;
    this.area.scrollTop = 0;
    this.button.hidden = true;
  }

  /** Goes to the end and stays there. */
  pin() {
    this.#pinned = true;
    this.follow();
  }

  /** Goes to the end if the reader is there. */
  follow() {
    if (this.#pinned) this.area.scrollTop = this.area.scrollHeight;
    this.#offer();
  }

  #offer() {
    this.button.hidden = this.#pinned || this.area.querySelector("article") === null;
  }
}
