/** Scrolls to the end of the conversation while it grows, unless the reader has scrolled up. */

const END_TOLERANCE_PX = 24;

export class Scroller {
  #pinned = true;
  #lastTop = 0;

  /**
   * @param {HTMLElement} area
   * @param {HTMLButtonElement} button scrolls to the end
   */
  constructor(area, button) {
    this.area = area;
    this.button = button;
    area.addEventListener("scroll", () => this.#moved(), { passive: true });
    button.addEventListener("click", () => this.pin());
    // The height also changes with the window, a phone's keyboard or an open editor.
    const observer = new ResizeObserver(() => this.follow());
    observer.observe(area);
    for (const child of area.children) observer.observe(child);
  }

  #moved() {
    const { scrollTop, scrollHeight, clientHeight } = this.area;
    const left = scrollHeight - scrollTop - clientHeight;
    if (left < END_TOLERANCE_PX) this.#pinned = true;
    else if (scrollTop < this.#lastTop) this.#pinned = false; // scrolling up comes only from the reader
    this.#lastTop = scrollTop;
    this.#updateButton();
  }

  /** Scrolls to the start and does not follow the end. */
  reset() {
    this.#pinned = false;
    this.area.scrollTop = 0;
    this.button.hidden = true;
  }

  /** Scrolls to the end and follows it from now on. */
  pin() {
    this.#pinned = true;
    this.follow();
  }

  /** Scrolls to the end if it is being followed. */
  follow() {
    if (this.#pinned) this.area.scrollTop = this.area.scrollHeight;
    this.#updateButton();
  }

  #updateButton() {
    this.button.hidden = this.#pinned || this.area.querySelector("article") === null;
  }
}
