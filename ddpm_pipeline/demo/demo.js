// The sliders over precomputed frames, and the canvas for a mask. Events are caught at the document, since the page puts
// new elements in place of old ones.
const ddpmDemo = (() => {
  const TABS = "#demo-generate, #demo-interpolate, #demo-repair, #demo-trajectory";
  let image = null; // what is under the mask
  let mask = null; // one 0 or 1 for each pixel, row by row
  let cursor = null; // [x, y] of the keyboard
  let last = null; // where the pointer was
  let awaited = null; // results that are to come into view

  const canvas = () => document.getElementById("demo-mask");
  const brush = () => Number(document.querySelector("#demo-brush input").value) || 1;

  function draw() {
    const element = canvas();
    if (!element) return;
    const { width, height } = element;
    const context = element.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (image) context.drawImage(image, 0, 0, width, height);
    context.fillStyle = "rgba(255, 90, 0, 0.75)";
    (mask || []).forEach((on, i) => on && context.fillRect(i % width, Math.floor(i / width), 1, 1));
    if (cursor && document.activeElement === element) {
      context.fillStyle = "rgba(0, 120, 255, 0.9)";
      context.fillRect(cursor[0], cursor[1], 1, 1);
    }
  }

  function clear() {
    const element = canvas();
    mask = new Uint8Array(element.width * element.height);
    draw();
  }

  function paint(x, y) {
    const { width, height } = canvas();
    const radius = brush() / 2;
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(height, y + radius + 1); row++)
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(width, x + radius + 1); column++)
        if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= Math.max(radius, 0.71)) mask[row * width + column] = 1;
  }

  // A fast pointer leaves gaps between its events: paint the line from one to the next.
  function paintTo(event) {
    const element = canvas();
    const box = element.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * element.width;
    const y = ((event.clientY - box.top) / box.height) * element.height;
    const [fromX, fromY] = last || [x, y];
    const parts = Math.max(1, Math.ceil(2 * Math.hypot(x - fromX, y - fromY)));
    for (let i = 1; i <= parts; i++) paint(fromX + ((x - fromX) * i) / parts, fromY + ((y - fromY) * i) / parts);
    last = [x, y];
    draw();
  }

  document.addEventListener("pointerdown", (event) => {
    if (event.target !== canvas()) return;
    if (!mask) clear();
    event.target.setPointerCapture(event.pointerId);
    last = null;
    paintTo(event);
  });
  document.addEventListener("pointermove", (event) => {
    if (last && event.target === canvas() && event.buttons) paintTo(event);
  });
  document.addEventListener("pointerup", () => (last = null));
  document.addEventListener("keydown", (event) => {
    const element = canvas();
    if (!element || event.target !== element) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    cursor = cursor || [Math.floor(element.width / 2), Math.floor(element.height / 2)];
    if (moves[event.key]) {
      cursor = [
        Math.min(element.width - 1, Math.max(0, cursor[0] + moves[event.key][0])),
        Math.min(element.height - 1, Math.max(0, cursor[1] + moves[event.key][1])),
      ];
    } else if (event.key === " ") {
      if (!mask) clear();
      paint(cursor[0] + 0.5, cursor[1] + 0.5);
    } else return;
    event.preventDefault();
    draw();
  });
  // Where settings and results are below each other, the results would be out of view.
  document.addEventListener("click", (event) => {
    awaited = event.target.closest?.("button.primary")?.closest(TABS)?.querySelector(".demo-output") || awaited;
  });
  for (const type of ["wheel", "touchmove", "keydown"]) document.addEventListener(type, () => (awaited = null));
  new MutationObserver(() => {
    if (!awaited?.querySelector(".demo-results, .demo-progress")) return;
    const { top, bottom } = awaited.getBoundingClientRect();
    if (top > window.innerHeight / 2 && bottom > window.innerHeight) awaited.scrollIntoView();
    else awaited = null;
  }).observe(document, { childList: true, subtree: true });
  document.addEventListener("focusin", draw);
  document.addEventListener("focusout", () => setTimeout(draw));

  return {
    // Shows the frame that a slider is at.
    show(slider) {
      const viewer = slider.closest(".demo-viewer");
      viewer.querySelectorAll(".demo-frame").forEach((frame, i) => {
        frame.hidden = i !== Number(slider.value);
        if (frame.hidden) return;
        viewer.querySelector("output").textContent = frame.dataset.label;
        slider.setAttribute("aria-valuetext", frame.dataset.label);
      });
    },
    // Puts an image, a data URI, under an empty mask.
    setImage(uri) {
      clear();
      image = null;
      draw();
      if (!uri) return;
      const next = new Image();
      next.onload = () => {
        image = next;
        draw();
      };
      next.src = uri;
    },
    clear,
    mask: () => (mask ? Array.from(mask).join("") : ""),
  };
})();
